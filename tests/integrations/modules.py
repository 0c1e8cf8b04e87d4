"""Modules of many shapes, each with what it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn


class Tied(nn.Module):
    """An embedding whose weight is the head's too; the head is cut into rows where it is large."""

    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 48)
        self.body = nn.Linear(48, 48)
        self.head = nn.Linear(48, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return cast("Tensor", self.head(torch.tanh(self.body(self.embed(ids)))))


class Own(nn.Module):
    """Weights of its own of several kinds, children, and use outside the children's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(32))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.second = nn.Linear(32, 32)
        self.first = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.table = nn.ParameterList([nn.Parameter(torch.randn(32)) for _ in range(3)])
        self.named = nn.ParameterDict({"a": torch.randn(32, 32)})
        self.register_buffer("offset", torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x * self.scale) + self.scalar + self.empty.sum()
        for weight in self.table:
            x = x * weight
        x = F.linear(x, self.second.weight.t()) @ self.named["a"]
        offset = cast("Tensor", self.offset)
        return torch.tanh(self.second(self.first(x)) + offset)


class Bag(nn.Module):
    """Containers inside containers, whose forward nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "inner": nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.LayerNorm(32)}),
                "list": nn.ModuleList([nn.Linear(32, 32) for _ in range(3)]),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = cast("nn.ModuleDict", self.parts["inner"])
        for layer in reversed(list(cast("nn.ModuleList", self.parts["list"]))):
            x = inner["b"](layer(inner["a"](x)))
        return x


class Returning(nn.Module):
    """Returns its own weight, and views of it, beside its result."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.give = _Give()

    def forward(self, x: Tensor) -> Tensor:
        weight, inside = self.give(x)
        y = self.layer(self.layer(x))
        return torch.cat([weight, inside["row"][0].expand(2, -1), y])


class _Give(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32))

    def forward(self, _x: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        return self.weight, {"row": [self.weight[1:2]]}


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = self.layer(x) + self.bias
        return cast("Tensor", self(x, depth - 1) * self.bias if depth else x)


class Branching(nn.Module):
    """Takes another branch in each pass, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for index in (4, 0, 0, 3) if float(x.sum()) > 0 else (1, 2, 4):
            x = self.layers[index](x)
        return x


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads its children's weights without calling them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.attention(x, x, x)[0])


class First(nn.Module):
    """Gives the first of what the module inside returns."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.inside(x)[0])


class ByName(nn.Module):
    """Calls the functions with arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16384, 32)
        self.head = nn.Linear(32, 16384)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(input=ids, weight=self.table.weight)
        return F.linear(input=x, weight=self.head.weight, bias=self.head.bias)


def shared() -> nn.Module:
    layer = nn.Linear(32, 32)
    return nn.Sequential(layer, nn.Sequential(layer, nn.ReLU(), layer), nn.LayerNorm(32), layer)


def typed(dtype: torch.dtype) -> nn.Module:
    module = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).to(dtype)
    return module.requires_grad_(requires_grad=False)


class Integers(nn.Module):
    """Weights of dtypes that no layer has."""

    def __init__(self) -> None:
        super().__init__()
        for name, dtype in (("a", torch.int8), ("b", torch.int64), ("c", torch.bool)):
            weight = torch.randint(0, 2, (8, 32)).to(dtype)
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        self.d = nn.Parameter(torch.randn(32, dtype=torch.complex64), requires_grad=False)
        self.e = nn.Parameter(torch.randn(32, dtype=torch.complex128), requires_grad=False)
        self.f = nn.Parameter(torch.randn(32).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        total = cast("Tensor", self.a) + cast("Tensor", self.b) * cast("Tensor", self.c)
        return torch.cat(
            [(x * self.d * self.e).abs().flatten(), (total * self.f.float()).flatten()]
        )


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def ids(count: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, count, (2, 5))


def encoder(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, dropout=0)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "one linear layer": (lambda: nn.Linear(32, 16), floats(3, 32)),
    "tied": (Tied, ids(64)),
    "tied, cut into rows": (lambda: Tied(32768 + 64 * 9), ids(32768)),
    "a large head with a bias": (lambda: nn.Linear(24, 16384 + 128), floats(2, 24)),
    "a large head, one token": (lambda: nn.Linear(24, 16384 + 128), floats(1, 24)),
    "a large table": (lambda: nn.Embedding(20000, 16, padding_idx=3), ids(20000)),
    "own weights and children": (Own, floats(2, 32)),
    "containers": (Bag, floats(2, 32)),
    "returns its weight": (Returning, floats(2, 32)),
    "calls itself": (Recursive, floats(2, 32)),
    "branches": (Branching, floats(2, 32)),
    "arguments by name": (ByName, ids(16384)),
    "attention": (Attention, floats(2, 5, 32)),
    "attention above the size of a block": (lambda: Attention(1024), floats(1, 3, 1024)),
    "encoder": (lambda: encoder(32, 3), floats(2, 5, 32)),
    "encoder layers above the size of a block": (lambda: encoder(1024, 1), floats(1, 3, 1024)),
    "shared submodule": (shared, floats(2, 32)),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 2, 3)),
        floats(1, 3, 9, 9),
    ),
    "channels last": (
        lambda: nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        floats(1, 3, 9, 9),
    ),
    "embedding bag": (lambda: nn.EmbeddingBag(50, 16), ids(50)),
    "lstm": (lambda: First(nn.LSTM(16, 16, 2, batch_first=True)), floats(2, 5, 16)),
    "gru": (lambda: nn.Sequential(nn.Linear(16, 16), First(nn.GRU(16, 16))), floats(5, 16)),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 16)),
        floats(2, 32),
    ),
    "integers and complex numbers": (Integers, floats(32)),
    "no weights": (nn.ReLU, floats(3)),
}
for _dtype in (torch.bfloat16, torch.float16, torch.float64):
    CASES[str(_dtype)] = (
        functools.partial(typed, _dtype),
        functools.partial(torch.randn, 3, 32, dtype=_dtype),
    )
