r"""Qwen-Image-Edit: a picture and what to do with it.

    python examples/qwen_image_edit.py --model Qwen-Image-Edit --image fox.png \
        --prompt "make it night" --allocation "cuda:0,12gb;cpu,*"

A real one needs torchvision, which its processor of pictures is written with. The tiny one here is
built in memory, and distributed as any pipeline that a program has already.
"""

import shared
import tiny
import torch
from PIL import Image

import distorch


def main() -> None:
    """Edit one picture."""
    asked = shared.arguments(__doc__, tiny.nothing, "cpu,8mb;disk,*", "image")
    if asked.is_tiny:
        pipe = tiny.qwen_image_edit()
        handle = distorch.distribute(pipe, asked.allocation)
    else:
        pipe = distorch.load(asked.model, asked.allocation)
        handle = distorch.handle_of(pipe)
    image = Image.open(asked.image) if asked.image else Image.new("RGB", (64, 64), "orange")
    watch = shared.Watch(handle)
    made = pipe(
        image=image,
        prompt=asked.prompt,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    watch.report()


if __name__ == "__main__":
    main()
