"""A disk as the donor: what neither the card nor the RAM has room for.

    python examples/disk_donor.py --model FLUX.1-dev --allocation "cuda:0,8gb;cpu,8gb;disk,*"

Weights are read from the model's own files, in place. Expect the disk's bandwidth to set the pace:
E near 1 says that it never rested. For a disk of your own say ``disk:/mnt/nvme,*``.
"""

import shared
import tiny

import distorch


def main() -> None:
    """Draw one picture with nothing at rest in memory."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), "cpu,0b;disk,*")
    pipe = distorch.load(asked.model, asked.allocation)
    watch = shared.run(pipe, asked)
    stats = distorch.handle_of(pipe)["transformer"].stats()
    print(
        f"read {shared.mib(stats.streamed_bytes)}, used {shared.mib(stats.cached_bytes)} in place"
    )
    watch.report()


if __name__ == "__main__":
    main()
