"""A packed weight computes as the dense one it stands for, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import gguf
import libgguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor, nn

from distorch.errors import ModelError
from distorch.quant.block_formats import BLOCK_FORMATS, BlockFormat
from distorch.quant.dequantize import dequantize
from distorch.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FORMATS = [
    *("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ2_XXS", "IQ4_XS", "TQ2_0"),
]
NUM_ROWS, NUM_COLUMNS = 2048 + 512, 512  # several tiles of 2-4 MiB


def make(
    form: str = "Q4_K",
    rows: int = NUM_ROWS,
    columns: int = NUM_COLUMNS,
    dtype: torch.dtype = torch.float32,
) -> tuple[QuantTensor, Tensor]:
    """A packed weight, and the dense one that the oracle makes of it."""
    rng = np.random.default_rng(rows + columns)
    weights = rng.normal(0, 0.05, (rows, columns)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[form]
    by_libgguf = form.endswith("K") or form.startswith("IQ")
    quantise = libgguf.quantize_rows if by_libgguf else gguf.quants.quantize
    packed = np.ascontiguousarray(quantise(weights, kind)).view(np.uint8)
    raw = torch.empty(packed.size, dtype=torch.uint8)  # torch's memory: 64-byte aligned
    raw.copy_(torch.from_numpy(packed.reshape(-1)))
    dense = torch.empty(rows, columns, dtype=torch.float32)
    dense.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).reshape(rows, columns)))
    return QuantTensor(raw, BLOCK_FORMATS[form], (rows, columns), dtype), dense.to(dtype)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def q4_k() -> tuple[QuantTensor, Tensor]:
    return make("Q4_K")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_linear_of_every_format_gives_the_dense_bits(form: str, num_tokens: int) -> None:
    weight, dense = make(form)
    x, bias = torch.randn(num_tokens, NUM_COLUMNS), torch.randn(NUM_ROWS)
    with torch.inference_mode():
        assert torch.equal(F.linear(x, weight), F.linear(x, dense))
        assert torch.equal(F.linear(x, weight, bias), F.linear(x, dense, bias))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 200])
def test_linear_of_any_number_of_tokens_gives_the_dense_bits(
    num_tokens: int, q4_k: tuple[QuantTensor, Tensor], *, has_bias: bool
) -> None:
    weight, dense = q4_k
    bias = torch.randn(NUM_ROWS) if has_bias else None
    x = torch.randn(num_tokens, NUM_COLUMNS)
    with torch.inference_mode():
        for view in (x, x.unsqueeze(0), x.view(-1, 1, NUM_COLUMNS)):
            assert torch.equal(F.linear(view, weight, bias), F.linear(view, dense, bias))
        assert torch.equal(F.linear(x[0], weight, bias), F.linear(x[0], dense, bias))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "columns"), [(2560, 512), (1100, 1024), (513, 4096), (16385, 64), (6, 65536), (1, 256)]
)
def test_one_token_gives_the_dense_bits_for_any_shape_and_number_of_threads(
    rows: int, columns: int, num_threads: int
) -> None:
    """A matrix-vector product is shared by rows among threads: where tiles end must not show."""
    torch.set_num_threads(num_threads)
    weight, dense = make("Q8_0", rows, columns)
    with torch.inference_mode():
        for x in (torch.randn(1, columns), torch.randn(columns), torch.randn(1, 1, columns)):
            assert torch.equal(F.linear(x, weight), F.linear(x, dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_linear_in_half_precision_gives_the_dense_bits(dtype: torch.dtype, num_tokens: int) -> None:
    weight, dense = make("Q6_K", dtype=dtype)
    x, bias = torch.randn(num_tokens, NUM_COLUMNS).to(dtype), torch.randn(NUM_ROWS).to(dtype)
    with torch.inference_mode():
        assert F.linear(x, weight).dtype == dtype
        assert torch.equal(F.linear(x, weight), F.linear(x, dense))
        assert torch.equal(F.linear(x, weight, bias), F.linear(x, dense, bias))


def test_linear_of_strided_inputs_and_of_none(q4_k: tuple[QuantTensor, Tensor]) -> None:
    weight, dense = q4_k
    with torch.inference_mode():
        for x in (
            torch.randn(NUM_COLUMNS, 3).t(),
            torch.randn(NUM_COLUMNS, 1).t(),
            torch.randn(1, 2 * NUM_COLUMNS)[:, ::2],
            torch.randn(0, NUM_COLUMNS),
            torch.randn(2, 0, NUM_COLUMNS),
        ):
            assert torch.equal(F.linear(x, weight), F.linear(x, dense))


def test_linear_and_embedding_take_their_arguments_by_name(
    q4_k: tuple[QuantTensor, Tensor],
) -> None:
    weight, dense = q4_k
    x, ids, bias = torch.randn(2, NUM_COLUMNS), torch.tensor([3, 0]), torch.randn(NUM_ROWS)
    with torch.inference_mode():
        assert torch.equal(
            F.linear(input=x, weight=weight, bias=bias), F.linear(input=x, weight=dense, bias=bias)
        )
        assert torch.equal(
            F.embedding(input=ids, weight=weight), F.embedding(input=ids, weight=dense)
        )


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_linear_under_autocast_gives_the_dense_dtype_and_bits(num_tokens: int) -> None:
    weight, dense = make("Q8_0")
    x = torch.randn(num_tokens, NUM_COLUMNS)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found, expected = F.linear(x, weight), F.linear(x, dense)
        assert found.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(found, expected)


def test_linear_of_a_wrong_width_is_torchs_error(q4_k: tuple[QuantTensor, Tensor]) -> None:
    for x in (torch.randn(1, NUM_COLUMNS - 1), torch.randn(1, 2 * NUM_COLUMNS)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            F.linear(x, q4_k[0])
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(NUM_COLUMNS // 2, 2), q4_k[0])  # as many numbers as one token has


def test_linear_of_a_wrong_dtype_is_torchs_error(q4_k: tuple[QuantTensor, Tensor]) -> None:
    for num_tokens in (1, 2):
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(torch.randn(num_tokens, NUM_COLUMNS, dtype=torch.float64), q4_k[0])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_gives_the_dense_rows(form: str, dtype: torch.dtype) -> None:
    weight, dense = make(form, 300, 256, dtype)
    for ids in (
        torch.randint(0, 300, (5, 7)),
        torch.tensor(299),
        torch.tensor([0, 0, 299], dtype=torch.int32),
        torch.empty(2, 0, dtype=torch.int64),
    ):
        found = F.embedding(ids, weight, padding_idx=3)
        assert found.dtype == dtype
        assert torch.equal(found, F.embedding(ids, dense, padding_idx=3))


@pytest.mark.parametrize("wrong", [300, -1, 10**9])
def test_embedding_out_of_range_is_an_index_error(wrong: int) -> None:
    weight, _ = make("Q8_0", 300, 256)
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([0, wrong]), weight)


def test_embedding_decodes_only_the_rows_it_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from distorch.quant import tensor as module

    decoded: list[int] = []

    def counted(packed: Tensor, form: type[BlockFormat], out: Tensor) -> Tensor:
        decoded.append(packed.numel())
        return dequantize(packed, form, out)

    monkeypatch.setattr(module, "dequantize", counted)
    weight, _ = make("Q8_0", 300, 256)
    F.embedding(torch.tensor([5, 6, 5]), weight)
    assert decoded == [3 * 256 // 32 * 34]


OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "add": lambda w: w + 1,
    "radd": lambda w: 2 * w,
    "matmul": lambda w: torch.ones(3, 256) @ w.T,
    "einsum": lambda w: torch.einsum("ij,kj->ik", torch.ones(3, 256), w),
    "index": lambda w: w[2:5, ::2],
    "double": lambda w: w.double(),
    "norm": torch.linalg.norm,
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack((w, w * 0)),
    "clone": lambda w: w.clone(),
    "chunk": lambda w: w.chunk(2)[1],
    "mean": lambda w: w.mean(dim=-1),
    "bool": lambda w: w > 0,
    "addmm": lambda w: torch.addmm(torch.zeros(256), torch.ones(2, 300), w),
    "layer_norm": lambda w: F.layer_norm(w, (256,)),
    "embedding_bag": lambda w: F.embedding_bag(torch.tensor([[1, 2]]), w, mode="mean"),
    "sum": lambda w: w.sum(),
    "iterate": lambda w: next(iter(w)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_other_operation_gets_the_dense_weight(name: str) -> None:
    weight, dense = make("Q6_K", 300, 256)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            found, expected = OPERATIONS[name](weight), OPERATIONS[name](dense)
        assert type(found) is Tensor
        assert isinstance(expected, Tensor)
        assert torch.equal(found, expected)


def test_a_materialized_weight_stays_valid_when_others_are_decoded() -> None:
    weight, dense = make("Q8_0", 300, 256)
    other, _ = make("Q8_0", 64, 256)
    whole = weight.materialize()
    F.linear(torch.ones(2, 256), other)
    F.linear(torch.ones(2, 256), weight * 0)
    assert torch.equal(whole, dense)


@pytest.mark.parametrize("change", ["zero_", "fill", "copy_", "mul_", "max_norm"])
def test_what_would_change_the_weight_in_place_is_refused_not_lost(change: str) -> None:
    """A change of a dense copy would be forgotten: load_state_dict would seem to have worked."""
    weight, dense = make("Q8_0", 300, 256)
    ids = torch.arange(9)

    def change_it() -> object:
        with torch.no_grad():
            if change == "max_norm":
                expected = F.embedding(ids, dense, max_norm=0.1)
                assert torch.equal(F.embedding(ids, weight, max_norm=0.1), expected)
                raise RuntimeError  # the right rows are as good as a refusal
            if change == "copy_":
                return weight.copy_(torch.ones(300, 256))
            if change == "mul_":
                return weight.mul_(2)
            return weight.zero_() if change == "zero_" else weight.fill_(1)

    with pytest.raises((RuntimeError, TypeError, ValueError)):
        change_it()


def test_a_packed_weight_passes_for_a_parameter() -> None:
    weight, _ = make("Q8_0", 64, 256)
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    module = nn.Linear(256, 64, bias=False)
    module.weight = weight
    assert dict(module.named_parameters())["weight"] is weight
    assert sum(p.numel() for p in module.parameters()) == 64 * 256
    assert (weight.dim(), weight.size(0), weight.stride(), weight.device.type) == (
        2,
        64,
        (256, 1),
        "cpu",
    )


@pytest.mark.parametrize("twin", [copy.copy, Tensor.detach, lambda w: w.data])
def test_copy_detach_and_data_are_the_same_bytes(twin: Callable[[QuantTensor], Tensor]) -> None:
    weight, dense = make("Q8_0", 64, 256)
    other = twin(weight)
    assert isinstance(other, QuantTensor)
    assert other.packed.data_ptr() == weight.packed.data_ptr()
    assert (other.shape, other.dtype) == (weight.shape, weight.dtype)
    assert torch.equal(other + 0, dense)


@pytest.mark.parametrize("made_in", [False, True])
@pytest.mark.parametrize("asked_in", [False, True])
def test_a_state_dict_can_be_asked_for_in_either_mode(*, made_in: bool, asked_in: bool) -> None:
    layer = torch.nn.Linear(256, 4, bias=False)
    with torch.inference_mode(made_in):
        layer._parameters["weight"] = make("Q8_0", 4, 256)[0]  # type: ignore[assignment]
    with torch.inference_mode(asked_in):
        assert layer.state_dict()["weight"].shape == (4, 256)


def test_repr_reads_nothing() -> None:
    weight, _ = make("Q8_0", 64, 256)
    weight.packed = None  # type: ignore[assignment]
    assert repr(weight) == "QuantTensor(shape=(64, 256), dtype=torch.float32)"


def test_pickling_says_what_to_do_first() -> None:
    with pytest.raises(ModelError, match="remove"):
        pickle.dumps(make("Q8_0", 64, 256)[0])


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_whose_weight_was_decoded_over_raises(num_tokens: int, dtype: torch.dtype) -> None:
    weight, _ = make(dtype=dtype)
    other, _ = make("Q8_0", 64, 512)
    x = torch.randn(num_tokens, NUM_COLUMNS).to(dtype).requires_grad_()
    y = F.linear(x, weight).sum()
    F.linear(torch.randn(2, 512), other)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("shape", [(64, 256), (NUM_ROWS, NUM_COLUMNS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_right_or_refused(
    num_tokens: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, dense = make("Q8_0", *shape, dtype)
    x = torch.randn(num_tokens, shape[1]).to(dtype).requires_grad_()
    try:
        F.linear(x, weight).sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017  either is right
        return
    twin = x.detach().clone().requires_grad_()
    F.linear(twin, dense).sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("shape", [(256,), (3, 4, 256)])
def test_weights_of_other_ranks_compute_too(shape: tuple[int, ...]) -> None:
    flat, dense = make("Q8_0", int(np.prod(shape)) // 256, 256)
    weight = QuantTensor(flat.packed.view(-1), BLOCK_FORMATS["Q8_0"], shape, torch.float32)
    assert torch.equal(weight * 2, dense.view(shape) * 2)
    if len(shape) == 1:
        x = torch.randn(5, 256)
        assert torch.equal(F.linear(x, weight), F.linear(x, dense.view(-1)))
