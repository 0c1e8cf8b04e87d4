"""Known models in plain torch, without what does not count: the same weights, the same products.

Block shapes are those of FLUX.1-dev, Qwen-Image, Wan 14B and a Llama of 70B. Bytes and FLOPs agree
with diffusers' classes within 1 % (tests/benchmarks/test_gpu.py); results mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gpu.networks import HEAD, TIMES, Flux, Llama, QwenImage, Wan

Inputs = Callable[[], dict[str, Tensor]]
"""Makes what a forward is given, on the host, in float32 or integers; the same each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model to build on the meta device, and what one step of it is given.

    ``lists`` name the module lists whose children are the blocks that other schemes stream.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    lists: tuple[str, ...]


def flux(
    dim: int = 3072, double: int = 19, single: int = 38, size: int = 1024, text_dim: int = 4096
) -> Shape:
    """FLUX.1-dev: ``size`` is the picture's side in pixels."""
    tokens = (size // 16) ** 2
    return Shape(
        name=f"FLUX.1-dev {size}x{size}",
        build=partial(Flux, dim, double, single, text_dim),
        inputs=partial(_picture_inputs, tokens, text_tokens=text_dim // 8, text_dim=text_dim),
        lists=("dual", "single"),
    )


def qwen_image(dim: int = 3072, layers: int = 60, size: int = 1328, text_dim: int = 3584) -> Shape:
    """Qwen-Image."""
    tokens = (size // 16) ** 2
    return Shape(
        name=f"Qwen-Image {size}x{size}",
        build=partial(QwenImage, dim, layers, text_dim),
        inputs=partial(
            _picture_inputs, tokens, text_tokens=text_dim // 28, text_dim=text_dim, pooled=False
        ),
        lists=("dual",),
    )


def wan(
    dim: int = 5120,
    ffn: int = 13824,
    layers: int = 40,
    size: tuple[int, int] = (832, 480),
    frames: int = 81,
    text_dim: int = 4096,
) -> Shape:
    """Wan 2.1 14B, or one expert of Wan 2.2: text to video."""
    latents = ((frames - 1) // 4 + 1, size[1] // 8, size[0] // 8)
    return Shape(
        name=f"Wan-14B {size[0]}x{size[1]}x{frames}",
        build=partial(Wan, dim, ffn, layers, text_dim),
        inputs=partial(_video_inputs, latents, text_dim),
        lists=("blocks",),
    )


def llama(
    dim: int = 8192,
    ffn: int = 28672,
    layers: int = 80,
    vocabulary: int = 128256,
    kv_heads: int = 8,
    batch: int = 1,
    context: int = 256,
) -> Shape:
    """A Llama of 70B: one step of decoding, one token of each of a batch."""
    return Shape(
        name=f"70B decode, batch {batch}",
        build=partial(Llama, dim, ffn, layers, vocabulary, kv_heads),
        inputs=partial(_token_inputs, batch, context, vocabulary, kv_heads),
        lists=("layers",),
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def _picture_inputs(
    tokens: int, *, text_tokens: int, text_dim: int, pooled: bool = True
) -> dict[str, Tensor]:
    inputs = {
        "x": _random(1, tokens, 64),
        "text": _random(1, text_tokens, text_dim),
        "time": _random(1, TIMES),
    }
    return inputs | ({"pooled": _random(1, 768)} if pooled else {})


def _video_inputs(latents: tuple[int, int, int], text_dim: int) -> dict[str, Tensor]:
    return {
        "x": _random(1, 16, *latents),
        "text": _random(1, text_dim // 8, text_dim),
        "time": _random(1, TIMES),
    }


def _token_inputs(batch: int, context: int, vocabulary: int, kv_heads: int) -> dict[str, Tensor]:
    ids = torch.arange(batch).unsqueeze(1) * 97 % vocabulary
    return {"ids": ids, "past": _random(2, batch, kv_heads, context, HEAD)}
