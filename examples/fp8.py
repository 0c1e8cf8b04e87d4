"""Weights brought into fp8 while they are read: half the bytes to keep and to move.

    python examples/fp8.py --model FLUX.1-dev --allocation "cuda:0,8gb;cpu,*"

Nothing is built in memory first: a few MiB at a time are read and rounded. Expect half of what the
directory has. It is another model, to the rounding of its matrices; what is computed with it is the
same wherever it rests.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Draw one picture."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), "cpu,1mb;disk,*")
    pipe = distorch.load(asked.model, asked.allocation, weight_dtype="fp8_e4m3fn")
    handle = distorch.handle_of(pipe)
    watch = shared.Watch(handle)
    made = pipe(
        asked.prompt,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
    )
    shared.save(made, asked.output)
    before = sum(file.stat().st_size for file in asked.model.rglob("*.safetensors"))
    after = sum(each.plan.model_bytes for each in handle.values())
    print(f"{shared.mib(before)} in the directory, {shared.mib(after)} as fp8")
    watch.report()


if __name__ == "__main__":
    main()
