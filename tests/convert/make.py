"""Tiny models in their authors' names, as files to convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FLUX = "double_blocks.0.img_attn.proj.weight"  # by which a file is known as one of Flux


def save(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """Write a safetensors file with a note in its metadata."""
    save_file(dict(weights), path, metadata={"format": "pt", "note": "tiny"})
    return path


def flux(dtype: torch.dtype = torch.bfloat16, **more: Tensor) -> dict[str, Tensor]:
    """Return a few tensors of a Flux: matrices, a vector, a first layer, a row of no block."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    return {
        "img_in.weight": random(256, 64),
        FLUX: random(40, 512),
        "double_blocks.0.img_attn.proj.bias": random(512),
        "double_blocks.0.img_mlp.0.weight": random(16, 768),
        "double_blocks.0.odd.weight": random(64, 80),
        "double_blocks.0.tiny.weight": random(4, 256),
        **more,
    }
