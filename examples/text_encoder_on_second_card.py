r"""The text encoder on a second card: it computes there, and nothing of it comes to the first.

    python examples/text_encoder_on_second_card.py --model FLUX.1-dev \
        --allocation "cuda:0,10gb;cpu,*"

Expect T5 to stay on the second card from prompt to prompt, and the first card's budget to be for
the transformer and the VAE. Without two cards, virtual ones stand for them.
"""

import shared
import tiny

import distorch


def main() -> None:
    """Draw one picture."""
    first, second = shared.two_cards()
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), f"{first},8mb;cpu,*")
    pipe = distorch.load(
        asked.model, asked.allocation, components={"text_encoder_2": f"{second},*"}
    )
    watch = shared.run(pipe, asked)
    handle = distorch.handle_of(pipe)
    for device, nbytes in handle.weight_bytes.items():
        print(f"{device} has {shared.mib(nbytes)} of weights now")
    watch.report()
    handle.remove()


if __name__ == "__main__":
    main()
