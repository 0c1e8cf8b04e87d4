"""Qwen-Image: 20 B of transformer and 8 B of text encoder, with a negative prompt.

    python examples/qwen_image.py --model Qwen-Image --allocation "cuda:0,12gb;cpu,*"

Qwen-Image has 54 GiB of weights in bfloat16. Expect two passes of the transformer in each step, one
with the prompt and one with the negative prompt, and so each streamed weight twice.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Draw one picture."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("qwen_image"), "cpu,8mb;disk,*")
    pipe = distorch.load(asked.model, asked.allocation)
    watch = shared.Watch(distorch.handle_of(pipe))
    made = pipe(
        asked.prompt,
        negative_prompt="blurred",
        true_cfg_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    watch.report()


if __name__ == "__main__":
    main()
