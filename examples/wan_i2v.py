r"""Wan 2.1, image to video: an image encoder beside the text encoder.

    python examples/wan_i2v.py --model Wan2.1-I2V-14B-480P-Diffusers --image fox.png \
        --allocation "cuda:0,6gb;cpu,*"

Expect four models to take turns: CLIP sees the image, UMT5 reads the prompt, the VAE encodes the
image and, in the end, decodes the video.
"""

import shared
import tiny
import torch
from PIL import Image

import distorch


def main() -> None:
    """Make one video."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("wan_i2v"), "cpu,4mb;disk,*", "image")
    pipe = distorch.load(asked.model, asked.allocation)
    watch = shared.Watch(distorch.handle_of(pipe))
    made = pipe(
        image=Image.open(asked.image) if asked.image else Image.new("RGB", (32, 32), "orange"),
        prompt=asked.prompt,
        num_frames=5 if asked.is_tiny else 81,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    watch.report()


if __name__ == "__main__":
    main()
