r"""The VAE where there is room: on the CPU, or on another card.

    python examples/vae_on_another_device.py --model Wan2.1-T2V-14B-Diffusers \
        --allocation "cuda:0,20gb;cpu,*"

Decoding a long video takes more memory for what is computed than for the weights. Expect the
latents to go to the host once, and the card to keep all it has for the transformer. Without two
cards, virtual ones stand for them.
"""

import shared
import tiny

import distorch


def main() -> None:
    """Make one video."""
    card, _ = shared.two_cards()
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("wan"), f"{card},8mb;cpu,*")
    pipe = distorch.load(asked.model, asked.allocation, components={"vae": "cpu,*"})
    watch = shared.run(pipe, asked, num_frames=5 if asked.is_tiny else 81)
    handle = distorch.handle_of(pipe)
    print(f"the VAE computes on {handle['vae'].plan.compute}")
    watch.report()
    handle.remove()


if __name__ == "__main__":
    main()
