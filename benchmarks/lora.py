"""A LoRA on a model of 1 GiB: what it costs to add, to weigh anew, to run and to remove."""

from __future__ import annotations

from typing import Any

import torch
from common import Figures, Quartiles, seconds_of
from torch import nn

import distorch
from distorch.cli.output import show_table
from distorch.integrations.attach import Handle

NUM_ROUNDS = 5
_NUM_LAYERS, _WIDTH, _RANK = 16, 4096, 32  # 1 GiB of float32; a LoRA of 16 MiB
_LINES = ("cpu,*", "cpu,50%;disk,50%")
_NUM_WEIGHINGS = 100


def _tensors() -> dict[str, torch.Tensor]:
    """A LoRA of every layer, small enough for the model's numbers to stay what they are."""
    shapes = {"lora_A": (_RANK, _WIDTH), "lora_B": (_WIDTH, _RANK)}
    return {
        f"{layer}.{part}.weight": 0.01 * torch.randn(shape)
        for layer in range(_NUM_LAYERS)
        for part, shape in shapes.items()
    }


def run(num_rounds: int = NUM_ROUNDS) -> Figures:
    """Measure, print, and return the figures."""
    figures = {line: _measure(line, num_rounds) for line in _LINES}
    print(f"{_NUM_LAYERS} x Linear({_WIDTH}, {_WIDTH}), 1 GiB; a LoRA of rank {_RANK} on each")
    print(f"seconds; weighing is of {_NUM_WEIGHINGS} times one; quartiles of {num_rounds} rounds")
    names = ("distribute", "add", "weigh", "remove", "step", "step with it")
    rows = []
    for line, found in figures.items():
        cells = [found[name]["median"] for name in names]
        share = f"{found['share']:.1e}"
        rows.append([line, *(f"{seconds:.3g}" for seconds in cells), share, str(found["moved"])])
    show_table(("line", *names, "weigh / distribute", "base bytes moved"), rows)
    return figures


def _measure(line: str, num_rounds: int) -> Figures:
    torch.manual_seed(0)
    with torch.inference_mode():
        x = torch.randn(16, _WIDTH)
    tensors = _tensors()
    seconds: dict[str, list[float]] = {}
    moved = 0

    def timed(name: str, job: Any) -> Any:
        kept: list[Any] = []
        seconds.setdefault(name, []).append(seconds_of(lambda: kept.append(job())))
        return kept[0]

    for _ in range(num_rounds):
        model = nn.Sequential(
            *(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_NUM_LAYERS))
        ).requires_grad_(requires_grad=False)
        handle = timed("distribute", lambda model=model: distorch.distribute(model, line))
        with torch.inference_mode():
            model(x)
            timed("step", lambda model=model: model(x))
            lora = timed("add", lambda handle=handle: handle.add_lora(tensors))
            model(x)
            timed("step with it", lambda model=model: model(x))
            before = _moved(handle)
            timed("weigh", lambda lora=lora: _weigh(lora))
            moved += _moved(handle) - before
            timed("remove", lora.remove)
        handle.discard()
    seconds["weigh"] = [each / _NUM_WEIGHINGS for each in seconds["weigh"]]
    figures: Figures = {name: Quartiles.of(each).figures for name, each in seconds.items()}
    figures["share"] = figures["weigh"]["median"] / figures["distribute"]["median"]
    figures["moved"] = moved
    return figures


def _weigh(lora: Any) -> None:
    for number in range(_NUM_WEIGHINGS):
        lora.strength = number / _NUM_WEIGHINGS


def _moved(handle: Handle) -> int:
    stats = handle.stats()
    return stats.streamed_bytes + stats.cached_bytes


if __name__ == "__main__":
    run()
