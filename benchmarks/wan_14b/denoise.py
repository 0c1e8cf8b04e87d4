"""Denoises with the model in a file, in a process that may be under a cap; prints JSON at the end.

usage: denoise.py MODEL ALLOCATION STEPS SAMPLES
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

import distorch

_LATENT = (1, 16, 1, 8, 8)  # 16 tokens: what is asked of the memory is the same for more
_TEXT_TOKENS = 32
_SEED = 0


class Sampled:
    """Keeps what some layers were given and what they returned, in the pass before the last end."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.kept: dict[str, Tensor] = {}
        for index in sorted({0, len(layers) // 2, len(layers) - 1}):
            layers[index].register_forward_hook(self._keeping(index), with_kwargs=True)

    def _keeping(self, index: int) -> Any:
        def keep(_layer: nn.Module, given: Any, named: Any, returned: Tensor) -> None:
            hidden, text, time_embedding, rotary = [*given, *named.values()]
            values = {"hidden": hidden, "text": text, "time": time_embedding, "out": returned}
            values |= {"cos": rotary[0], "sin": rotary[1]}
            self.kept |= {f"{index}.{name}": value.clone() for name, value in values.items()}

        return keep


def denoise(model: nn.Module, num_steps: int) -> list[float]:
    """Run the steps of a sampler; return the seconds of each."""
    random = torch.Generator().manual_seed(_SEED)
    latent = torch.randn(_LATENT, generator=random)
    text = torch.randn(1, _TEXT_TOKENS, model.config.text_dim, generator=random)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    seconds = []
    for timestep in scheduler.timesteps:
        began = time.perf_counter()
        velocity = model(latent, timestep.expand(1), text, return_dict=False)[0]
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
        seconds.append(time.perf_counter() - began)
    assert bool(latent.isfinite().all()), "a model of random weights still computes numbers"
    return seconds


def main() -> None:
    """Load, denoise, and say what it took."""
    path, line, num_steps, samples = sys.argv[1:]
    began = time.perf_counter()
    model = distorch.load(path, line)
    ready = time.perf_counter() - began
    handle = distorch.handle_of(model)
    sampled = Sampled(model.blocks)
    with torch.inference_mode():
        seconds = denoise(model, int(num_steps))
    save_file(sampled.kept, Path(samples))
    stats = handle.stats()
    figures = {
        "ready_seconds": ready,
        "step_seconds": seconds,
        "held_bytes": handle.weight_bytes,
        "model_bytes": handle.plan.model_bytes,
        "streamed_bytes": stats.streamed_bytes,
        "efficiency": stats.efficiency,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
