"""FLUX.1 on a card that a third of it fits.

    python examples/flux.py --model FLUX.1-dev --allocation "cuda:0,10gb;cpu,*"

FLUX.1-dev has 31 GiB of weights in bfloat16, 22 of them in its transformer. Expect at most 10 GiB
at rest on the card, and a ring beside them; T5 gives its room to the transformer once it has read
the prompt.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Draw one picture."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), "cpu,8mb;disk,*")
    pipe = distorch.load(asked.model, asked.allocation)
    watch = shared.Watch(distorch.handle_of(pipe))
    made = pipe(
        asked.prompt,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    watch.report()


if __name__ == "__main__":
    main()
