"""What one pass on the meta device says of a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distorch.errors import ModelError
from distorch.formats.dtypes import DTYPES
from distorch.integrations.module_tree import describe
from distorch.plan.blocks import cut
from distorch.plan.cost import Profile
from distorch.plan.profile import profile_module
from distorch.plan.storage import FORMATS


def profiled(module: nn.Module, *args: Any, form: str | None = None, **kwargs: Any) -> Profile:
    root = describe(module).root
    return profile_module(module, root, args, kwargs, name="tiny", format=form)


def counted(module: nn.Module, *args: Any) -> int:
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        module(*args)
    return counter.get_total_flops()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def on_meta(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    with torch.device("meta"):
        return make(*args).eval()


def two_linears(a: int, b: int, c: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c))


class Attention(nn.Module):
    """Attention whose projections are blocks apart, if they are large."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.out = nn.Linear(width, width)  # defined first, used last
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            proj(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for proj in (self.q, self.k, self.v)
        )
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class Tied(nn.Module):
    """An embedding that is the head as well, of enough rows to be cut into runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20_000, 32)
        self.layer = nn.Linear(32, 32)
        self.head = nn.Linear(32, 20_000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.table(ids)))
        return logits


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "linears": (on_meta(two_linears, 64, 32, 8), empty(3, 64)),
    "convolution": (on_meta(nn.Conv3d, 4, 8, 2, 2), empty(1, 4, 2, 8, 8)),
    "attention": (on_meta(Attention, 64, 4), empty(2, 10, 64)),
    "attention, cut": (on_meta(Attention, 2048, 16), empty(2, 10, 2048)),
    "tied": (on_meta(Tied), empty(1, 7, dtype=torch.long)),
    "taken whole": (on_meta(nn.TransformerEncoderLayer, 64, 4), empty(5, 2, 64)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("form", [None, "bf16", "Q8_0", "Q4_K", "fp8"])
def test_block_flops_add_up_to_all_that_torch_counts(name: str, form: str | None) -> None:
    module, x = MODELS[name]
    profile = profiled(module, x, form=form)
    assert profile.total_flops == counted(module, x) > 0


@given(st.sampled_from(sorted(MODELS)), st.sampled_from([None, *sorted(FORMATS)]))
@settings(max_examples=60, deadline=None)
def test_blocks_are_those_that_the_runtime_cuts_each_once(name: str, form: str | None) -> None:
    module, x = MODELS[name]
    profile = profiled(module, x, form=form)
    if form is None:
        assert sorted(block.name for block in profile.blocks) == sorted(
            block.name for block in cut(describe(module).root)
        )
    parts = [part for block in profile.blocks for part in block.parts]
    rows = {(part.tensor, part.first_row) for part in parts}
    assert len(rows) == len(parts)
    held = sum(prod(part.shape) for part in parts)
    assert held == sum(parameter.numel() for parameter in module.parameters())
    assert all(part.nbytes == DTYPES[part.dtype].nbytes(part.shape) for part in parts)


def test_blocks_come_in_the_order_of_their_use() -> None:
    module, x = MODELS["attention, cut"]
    names = [block.name for block in profiled(module, x).blocks if "small" not in block.name]
    assert names == ["q", "k", "v", "out"]


def test_a_weights_flops_are_its_blocks_and_attentions_are_the_last_begun() -> None:
    module, x = MODELS["attention, cut"]
    profile = profiled(module, x)
    flops = dict(zip([block.name for block in profile.blocks], profile.flops, strict=True))
    linear, scores = 2 * 20 * 2048 * 2048, 2 * (2 * 2 * 10 * 10 * 2048)
    assert (flops["q"], flops["k"], flops["out"]) == (linear, linear, linear)
    assert flops["v"] == linear + scores
    assert flops["v (small)"] == 0


def test_a_cut_heads_flops_go_by_rows_and_its_embedding_is_no_visit() -> None:
    module, ids = MODELS["tied"]
    profile = profiled(module, ids, form="f32")
    names = [block.name for block in profile.blocks]
    assert names == ["", "table.weight[0:9728]", "table.weight[9728:20000]"]
    assert profile.flops[1:] == (2 * 7 * 32 * 9728, 2 * 7 * 32 * 10272)


def test_products_of_experts_are_counted() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 16, 32, dtype=torch.bfloat16))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight, offs=ends)

    x, ends = empty(24, 16, dtype=torch.bfloat16), empty(4, dtype=torch.int32)
    assert profiled(on_meta(Experts), x, ends).total_flops == 2 * 24 * 16 * 32


def test_what_the_pass_does_not_use_comes_last_and_costs_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(16, 16, bias=False)
            self.used = nn.Linear(16, 16, bias=False)
            self.fill = nn.Linear(2048, 2048, bias=False)  # so large that they are blocks apart

        def forward(self, x: Tensor) -> Tensor:
            used: Tensor = self.used(x)
            return used

    profile = profiled(on_meta(Model), empty(1, 16))
    assert [block.name for block in profile.blocks] == ["used", "idle", "fill"]
    assert profile.flops == (512, 0, 0)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_the_peak_of_two_linears_is_counted_by_hand(rows: int, a: int, b: int) -> None:
    """The input lives as long as its caller holds it, the first output as long as the second."""
    module = on_meta(two_linears, a, b, 1)
    x = empty(rows, a)
    profile = profiled(module, x)
    assert profile.activation_bytes == 4 * rows * (a + 2 * b)


def test_a_tensor_counts_for_as_long_as_it_is_referred_to() -> None:
    class Chain(nn.Module):
        def __init__(self, *, keep: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1))
            self.keep = keep

        def forward(self, x: Tensor) -> Tensor:
            kept = []
            for _ in range(4):
                x = x + self.weight
                if self.keep:
                    kept.append(x[:1])  # a view keeps all of it
            return x.mul_(2)

    x = empty(100)
    lean, holding = (on_meta(partial(Chain, keep=keep)) for keep in (False, True))
    assert profiled(lean, x).activation_bytes == 3 * 400  # the caller's x, one term, the next
    assert profiled(holding, x).activation_bytes == 5 * 400


def test_attention_holds_no_matrix_of_scores() -> None:
    module = on_meta(Attention, 64, 4)
    length = 4096
    peak = profiled(module, empty(1, length, 64)).activation_bytes
    assert peak <= 7 * length * 64 * 4
    assert peak < length * length  # of one byte an entry


def test_buffers_count_and_weights_do_not() -> None:
    module = on_meta(nn.Linear, 8, 8)
    module.register_buffer("table", empty(1000))
    assert profiled(module, empty(1, 8)).activation_bytes == 4000 + 2 * 32


@pytest.mark.parametrize("name", MODELS)
def test_the_same_module_has_the_same_profile_and_keeps_no_hooks(name: str) -> None:
    module, x = MODELS[name]
    first = profiled(module, x)
    assert profiled(module, x) == first == Profile.from_json(first.to_json())
    assert not any(inner._forward_pre_hooks for inner in module.modules())


def test_compute_dtype_is_that_of_the_module() -> None:
    layer = on_meta(nn.Linear, 64, 64)
    assert profiled(layer, empty(1, 64)).compute_dtype == "F32"
    half = layer.to(torch.bfloat16)
    assert profiled(half, empty(1, 64, dtype=torch.bfloat16), form="Q8_0").compute_dtype == "BF16"


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ModelError, match="weight is on cpu") as caught:
        profiled(nn.Linear(4, 4), empty(1, 4))
    assert "meta" in caught.value.hint
    with pytest.raises(ModelError, match="Linear cannot be run without its weights"):
        profiled(on_meta(nn.Linear, 4, 4), empty(1, 5))
    with pytest.raises(ModelError, match="no weights"):
        profiled(nn.ReLU(), empty(1, 5))

    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(ModelError, match="Looks cannot be run"):
        profiled(on_meta(Looks, 4, 4), empty(1, 4))
