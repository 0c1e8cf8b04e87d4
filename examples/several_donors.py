r"""Several donors at once: a second card and the host, each over a link of its own.

    python examples/several_donors.py --model FLUX.1-dev \
        --allocation "cuda:0,8gb;cuda:1,10gb;cpu,*"

Weights come over both links at the same time. Expect close to the sum of their speeds.
Without two cards, virtual ones stand for them.
"""

import shared
import tiny

import distorch


def main() -> None:
    """Draw one picture."""
    first, second = shared.two_cards()
    line = f"{first},4mb;{second},8mb;cpu,*"
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), line)
    pipe = distorch.load(asked.model, asked.allocation)
    shared.run(pipe, asked).report()
    distorch.handle_of(pipe).remove()


if __name__ == "__main__":
    main()
