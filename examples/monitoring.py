"""Watching a run: what each step has read and waited for, as it goes.

    python examples/monitoring.py --model FLUX.1-dev --allocation "cuda:0,10gb;cpu,*"

Expect one line for each step. A step that waits long has a link that is too slow for the budget:
``distorch plan`` says what would help.
"""

from typing import Any

import shared
import tiny
import torch

import distorch
from distorch import Handle


def main() -> None:
    """Draw one picture, and print the counters of the transformer after each step."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), "cpu,8mb;disk,*")
    pipe = distorch.load(asked.model, asked.allocation)
    handle = distorch.handle_of(pipe)
    transformer: Handle = handle["transformer"]
    watch = shared.Watch(handle)

    def step(_pipe: Any, number: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stats = transformer.stats()
        read = stats.streamed_bytes + stats.cached_bytes
        print(
            f"step {number + 1}: {stats.step_seconds:.2f} s so far, {shared.mib(read)} came, "
            f"{stats.waited_seconds:.3f} s waited, {shared.mib(transformer.weight_bytes)} here"
        )
        watch.look()
        return tensors

    generator = torch.Generator().manual_seed(0)
    made = pipe(asked.prompt, generator=generator, callback_on_step_end=step, **asked.call)
    shared.save(made, asked.output)
    watch.report()


if __name__ == "__main__":
    main()
