r"""Wan 2.2: two transformers of 14 B, of which one runs at a time.

    python examples/wan_two_experts.py --model Wan2.2-T2V-A14B-Diffusers \
        --allocation "cuda:0,8gb;cpu,*"

The two have 53 GiB in bfloat16. One denoises the first steps, the other the rest. Expect the
first to give its room on the card to the second when they change, once.
"""

import shared
import tiny

import distorch


def main() -> None:
    """Make one video, and say what the change of experts has moved."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("wan_two_experts"), "cpu,8mb;disk,*")
    pipe = distorch.load(asked.model, asked.allocation)
    watch = shared.run(pipe, asked, num_frames=5 if asked.is_tiny else 81)
    handle = distorch.handle_of(pipe)
    for name in ("transformer", "transformer_2"):
        print(f"{name} came to the device once: {shared.mib(handle[name].moved_bytes)}")
    watch.report()


if __name__ == "__main__":
    main()
