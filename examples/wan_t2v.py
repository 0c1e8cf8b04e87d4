"""Wan 2.1, text to video: 14 B in a few GiB.

    python examples/wan_t2v.py --model Wan2.1-T2V-14B-Diffusers --allocation "cuda:0,6gb;cpu,*"

The transformer has 27 GiB in bfloat16, UMT5 11. Expect 6 GiB at rest on the card, and a ring; what
sets the pace there is told by ``distorch plan wan-14b --machine rtx4070-12gb --frames 81``.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Make one video."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("wan"), "cpu,4mb;disk,*")
    pipe = distorch.load(asked.model, asked.allocation)
    watch = shared.Watch(distorch.handle_of(pipe))
    made = pipe(
        asked.prompt,
        num_frames=5 if asked.is_tiny else 81,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    watch.report()


if __name__ == "__main__":
    main()
