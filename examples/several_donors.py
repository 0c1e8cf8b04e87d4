r"""Several donors at once: a second card and the host, each over a link of its own.

    python examples/several_donors.py --model FLUX.1-dev \
        --allocation "cuda:0,8gb;cuda:1,10gb;cpu,*"

Weights come over both links at the same time. Expect close to the sum of their speeds.
Without two cards, virtual ones stand for them.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Draw one picture."""
    first, second = shared.two_cards()
    line = f"{first},4mb;{second},8mb;cpu,*"
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), line)
    pipe = distorch.load(asked.model, asked.allocation)
    handle = distorch.handle_of(pipe)
    watch = shared.Watch(handle)
    made = pipe(
        asked.prompt,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    watch.report()
    handle.remove()


if __name__ == "__main__":
    main()
