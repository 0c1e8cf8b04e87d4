"""Models for accelerators: small ones of many blocks, in every form that weights are stored in."""

from __future__ import annotations

import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import gguf
import libgguf
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

import distorch
from distorch.integrations.attach import Handle
from distorch.integrations.module_tree import Stored, describe
from distorch.integrations.request import Request
from distorch.tiers.sources import MemorySource
from tests.plan_strategies import roomy

if TYPE_CHECKING:
    from distorch.plan.plan import Plan

MACHINE = roomy("vgpu:0", "vgpu:1", "vgpu:2", "cpu", "disk")
FORMS = ("bf16", "fp8", "Q8_0", "Q4_K")
WIDTH, NUM_LAYERS, ROWS = 256, 8, 3


class Cast(nn.Module):
    """A linear layer that keeps its weight in a narrower dtype than it computes in."""

    def __init__(self) -> None:
        super().__init__()
        weight = (torch.randn(WIDTH, WIDTH) / 16).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def chain(num_layers: int = NUM_LAYERS, width: int = WIDTH) -> nn.Sequential:
    """Linear layers with norms between; two blocks for each layer of the usual width."""
    layers = [[nn.Linear(width, width), nn.LayerNorm(width), nn.GELU()] for _ in range(num_layers)]
    return nn.Sequential(*[module for layer in layers for module in layer])


@cache
def _plain(form: str) -> nn.Sequential:
    torch.manual_seed(1)
    if form == "fp8":
        layers = [[Cast(), nn.GELU()] for _ in range(NUM_LAYERS)]
        return nn.Sequential(*[module for layer in layers for module in layer])
    if form == "bf16":
        return chain().bfloat16()
    with torch.device("meta"):
        layers = [[nn.Linear(WIDTH, WIDTH), nn.GELU()] for _ in range(NUM_LAYERS)]
        return nn.Sequential(*[module for layer in layers for module in layer])


@cache
def _packed(form: str) -> dict[str, tuple[Stored, bytes]]:
    """Each tensor of a checkpoint, as it is stored."""
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[form]
    quantise = libgguf.quantize_rows if form.endswith("K") else gguf.quants.quantize
    tensors = {}
    for name, parameter in _plain(form).named_parameters():
        dense = rng.normal(0, 0.1, tuple(parameter.shape)).astype("f4")
        dtype = form if dense.ndim > 1 else "F32"
        raw = quantise(dense, kind).tobytes() if dense.ndim > 1 else dense.tobytes()
        tensors[name] = Stored(dtype=dtype, shape=dense.shape, nbytes=len(raw)), raw
    return tensors


def distributed(
    form: str, line: str | Plan, *, compute: str | None = None, **request: Any
) -> tuple[nn.Module, Handle]:
    """A new model of a form, distributed."""
    module = copy.deepcopy(_plain(form))
    if form in {"bf16", "fp8"}:
        return module, distorch.distribute(
            module, line, compute=compute, machine=MACHINE, **request
        )
    packed = _packed(form)
    stored = {name: kept for name, (kept, _) in packed.items()}
    source = MemorySource({name: memoryview(raw) for name, (_, raw) in packed.items()})
    handle = Handle(module, describe(module, stored), source)
    handle.bind(Request(allocation=line, compute=compute, **request), MACHINE, None)
    return module, handle


@cache
def examples(form: str) -> tuple[tuple[Tensor, Tensor], ...]:
    """Inputs, and what the model computes of them on the CPU, all its weights at rest."""
    torch.manual_seed(2)
    dtype = torch.bfloat16 if form in {"bf16", "fp8"} else torch.float32
    inputs = [torch.randn(ROWS, WIDTH, dtype=dtype) for _ in range(3)]
    module, handle = distributed(form, "cpu,*")
    with torch.inference_mode():
        found = tuple((x, module(x)) for x in inputs)
    handle.remove()
    return found


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether a result, wherever it is, has the expected bits."""
    mine, theirs = (each.detach().cpu().contiguous().view(-1) for each in (found, expected))
    return mine.dtype == theirs.dtype and torch.equal(
        mine.view(torch.uint8), theirs.view(torch.uint8)
    )
