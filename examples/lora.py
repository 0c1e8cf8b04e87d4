r"""A LoRA beside the weights: weighed anew between pictures, and no byte of the model moves.

    python examples/lora.py --model FLUX.1-dev --lora style.safetensors \
        --allocation "cuda:0,10gb;cpu,*"

Names are read as peft, diffusers, Kohya and ComfyUI write them. Expect three pictures: with the
LoRA, with half of it, and without.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Draw one picture at three strengths."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), "cpu,8mb;disk,*", "lora")
    pipe = distorch.load(asked.model, asked.allocation)
    handle = distorch.handle_of(pipe)
    lora = handle["transformer"].add_lora(asked.lora or tiny.flux_lora())
    watch = shared.Watch(handle)
    for strength in (1.0, 0.5, 0.0):
        lora.strength = strength
        made = pipe(
            asked.prompt,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=watch,
            **asked.call,
        )
        shared.save(made, asked.output.with_stem(f"{asked.output.stem}-{strength}"))
    watch.report()


if __name__ == "__main__":
    main()
