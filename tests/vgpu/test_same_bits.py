"""Results are the CPU's, bit for bit, whichever way operators run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distorch import vgpu

pytestmark = pytest.mark.vgpu

DEVICE = "vgpu:0"
randn = torch.randn


@pytest.fixture(autouse=True)
def _way(enqueued: bool) -> Iterator[None]:  # noqa: FBT001 (a fixture)
    torch.manual_seed(0)
    with vgpu.settings(enqueued=enqueued, races="raise"):
        yield


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(bits(found), bits(expected))


def rope(x: Tensor) -> Tensor:
    angles = torch.arange(12.0, device=x.device).view(3, 4)
    turns = torch.polar(torch.ones(3, 4, device=x.device), angles)
    return torch.view_as_real(torch.view_as_complex(x.view(3, 4, 2)) * turns).flatten()


def dequantise(raw: Tensor) -> Tensor:
    scales = raw[:, :2].view(torch.float16).float()
    shifts = torch.tensor([0, 4], device=raw.device, dtype=torch.uint8).reshape(1, 1, 2, 1)
    nibbles = raw[:, 2:].reshape(len(raw), -1, 1, 16) >> shifts
    return (scales * ((nibbles & 15).reshape(len(raw), -1).to(torch.int8) - 8)).bfloat16()


def into_a_view(x: Tensor) -> Tensor:
    out = torch.zeros(9, device=x.device)
    torch.mul(x, 2, out=out[3:6])
    return out


def foreach(a: Tensor, b: Tensor) -> Tensor:
    tensors = [a.clone(), b.clone()]
    torch._foreach_add_(tensors, 1.0)
    return torch.cat(torch._foreach_mul(tensors, 2.0))


def packed(num_blocks: int) -> Tensor:
    raw = torch.randint(0, 256, (num_blocks, 18), dtype=torch.uint8)
    raw[:, :2] = randn(num_blocks, 1).half().view(torch.uint8)
    return raw


def by_dtype(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    def of(*sizes: int) -> Tensor:
        return randn(*sizes).to(dtype)

    sdpa = functional.scaled_dot_product_attention
    return {
        f"linear {dtype}": (functional.linear, [of(2, 7, 64), of(96, 64), of(96)]),
        f"sdpa {dtype}": (sdpa, [of(2, 4, 33, 32) for _ in range(3)]),
        f"causal {dtype}": (partial(sdpa, is_causal=True), [of(1, 2, 9, 16) for _ in range(3)]),
        f"grouped {dtype}": (
            partial(sdpa, enable_gqa=True),
            [of(1, 4, 9, 16), of(1, 2, 9, 16), of(1, 2, 9, 16)],
        ),
        f"layer_norm {dtype}": (
            lambda x, w: functional.layer_norm(x, (64,), w, w),
            [of(5, 64), of(64)],
        ),
        f"rms_norm {dtype}": (lambda x, w: functional.rms_norm(x, (64,), w), [of(5, 64), of(64)]),
        f"group_norm {dtype}": (
            lambda x, w: functional.group_norm(x, 4, w, w),
            [of(2, 8, 5, 5), of(8)],
        ),
        f"gelu {dtype}": (partial(functional.gelu, approximate="tanh"), [of(5, 64)]),
        f"softmax {dtype}": (lambda x: functional.softmax(functional.silu(x), -1), [of(5, 64)]),
        f"conv2d {dtype}": (
            partial(functional.conv2d, padding=1),
            [of(1, 3, 16, 16), of(8, 3, 3, 3), of(8)],
        ),
        f"matmul {dtype}": (torch.matmul, [of(2, 5, 8), of(2, 8, 3)]),
    }


def cases() -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    torch.manual_seed(0)
    sdpa = functional.scaled_dot_product_attention
    found: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "sdpa mask": (
            lambda q, k, v, m: sdpa(q, k, v, attn_mask=m),
            [*(randn(1, 2, 9, 16) for _ in range(3)), randn(9, 9) > 0],
        ),
        "conv3d": (
            functional.conv3d,
            [randn(1, 3, 6, 8, 8).bfloat16(), randn(8, 3, 1, 2, 2).bfloat16()],
        ),
        "interpolate": (
            partial(functional.interpolate, scale_factor=2, mode="bilinear"),
            [randn(1, 3, 8, 8)],
        ),
        "embedding": (functional.embedding, [torch.randint(0, 10, (4,)), randn(10, 8)]),
        "cat and split": (
            lambda a, b: torch.cat([torch.stack(a.chunk(2)).flatten(), *b.split(2)]),
            [randn(6), randn(6)],
        ),
        "views": (
            lambda x: (
                x.view(4, 6)
                .t()
                .reshape(2, 12)[:, 1:7]
                .permute(1, 0)
                .contiguous()
                .unfold(0, 2, 1)
                .flatten()
            ),
            [randn(24)],
        ),
        "rope": (rope, [randn(24)]),
        "conjugate": (lambda x: x.conj().clone().imag, [randn(8, dtype=torch.complex64)]),
        "einsum": (partial(torch.einsum, "ij,kj->ik"), [randn(3, 4), randn(5, 4)]),
        "masks": (lambda x: torch.where(x > 0, x, -x)[x > 0.5], [randn(40)]),
        "index_select": (
            lambda x, i: x.index_select(0, i),
            [randn(9, 4), torch.tensor([3, 1, 1])],
        ),
        "host indices": (lambda x: x[torch.tensor([0, 2])], [randn(5)]),
        "host scalar": (lambda x: x * torch.tensor(2.0), [randn(5)]),
        "index_put_": (
            lambda x: x.clone().index_put_((torch.tensor([0, 1]),), torch.tensor(3.0)),
            [randn(5)],
        ),
        "unique": (lambda x: x.unique(), [torch.randint(0, 5, (40,))]),
        "nonzero": (lambda x: (x > 0).nonzero(), [randn(9)]),
        "topk": (lambda x: x.topk(3).values + x.sort().values[:3], [randn(9)]),
        "in place": (lambda x: x.clone().mul_(2).add_(1).clamp_(0).sub_(x), [randn(9)]),
        "out resized": (
            lambda x: torch.add(x, x, out=torch.empty(0, device=x.device)),
            [randn(9)],
        ),
        "out into a view": (into_a_view, [randn(3)]),
        "foreach": (foreach, [randn(3), randn(4)]),
        "bitwise": (
            lambda x: ((x >> 2) & 3) ^ ((x << 1) | 1) ^ ~x,
            [torch.randint(0, 256, (64,), dtype=torch.uint8)],
        ),
        "dequantise": (dequantise, [packed(10)]),
        "view as bfloat16": (
            lambda x: x[256:320].view(torch.bfloat16).view(4, 8) * 2,
            [torch.randint(0, 60, (4096,), dtype=torch.uint8)],
        ),
        "complex128": (lambda x: x @ x, [randn(4, 4, dtype=torch.complex128)]),
        "batch_norm": (
            lambda x: functional.batch_norm(x, None, None, training=True),
            [randn(4, 3, 5)],
        ),
        "cumsum": (lambda x: x.cumsum(0).flip(0), [torch.arange(9)]),
        "expand": (lambda x: x.expand(3, 4).clone() + x, [randn(1, 4)]),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found |= by_dtype(dtype)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        found[f"from {dtype}"] = (lambda x: x.bfloat16() * 2, [randn(64).to(dtype)])
        found[f"to {dtype}"] = (lambda x, dtype=dtype: x.to(dtype), [randn(64)])
        found[f"bytes of {dtype}"] = (lambda x: x.view(torch.uint8) ^ 1, [randn(64).to(dtype)])
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_the_bits_of_the_cpu(name: str) -> None:
    function, arguments = CASES[name]
    expected = function(*arguments)
    for _ in range(2):  # the second time, shapes are known
        found = function(*(argument.to(DEVICE) for argument in arguments))
        assert found.device == torch.device(DEVICE)
        assert_same(found, expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_model_gives_the_bits_of_the_cpu(guard: Callable[[], torch.no_grad]) -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = randn(2, 5, 32)
    parameter = model.linear1.weight
    with guard():
        expected = model(x)
        model.to(DEVICE)
        assert model.linear1.weight is parameter
        assert_same(model(x.to(DEVICE)), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_compute_and_refuse_gradients_they_lack(
    kind: Callable[[int, int], nn.RNNBase],
) -> None:
    model, x = kind(4, 4), randn(3, 1, 4)
    with torch.no_grad():
        expected = model(x)[0]
        model.to(DEVICE)
        assert_same(model(x.to(DEVICE))[0], expected)
    with pytest.raises(RuntimeError, match="no gradient"):
        model(x.to(DEVICE))


def gradients(
    device: str, function: Callable[..., Tensor], arguments: list[Tensor]
) -> list[Tensor]:
    leaves = [x.to(device, copy=True).requires_grad_() for x in arguments]
    function(*leaves).square().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize(
    "name", ["linear torch.float32", "sdpa torch.float32", "conv2d torch.float32", "sdpa mask"]
)
def test_gradients_are_the_cpus(name: str) -> None:
    function, arguments = CASES[name]
    floating = [x for x in arguments if x.is_floating_point()]
    if len(floating) < len(arguments):
        mask = arguments[-1]
        function = lambda q, k, v: functional.scaled_dot_product_attention(  # noqa: E731
            q, k, v, attn_mask=mask.to(q.device)
        )
    expected = gradients("cpu", function, floating)
    found = gradients(DEVICE, function, floating)
    assert len(found) == len(expected) == len(floating)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


AUTOCAST: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "linear": (lambda x: functional.linear(x, x), torch.bfloat16),
    "conv1d": (lambda x: functional.conv1d(x[None], x[:, :, None]), torch.bfloat16),
    "sdpa": (
        lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
        torch.bfloat16,
    ),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x), torch.bfloat16),
    "add": (lambda x: x.bfloat16() + x.bfloat16(), torch.bfloat16),
    "layer_norm": (lambda x: functional.layer_norm(x.bfloat16(), (8,)), torch.float32),
    "softmax": (lambda x: (x @ x).softmax(-1), torch.float32),
    "softmax of a dtype": (lambda x: x.softmax(-1, dtype=torch.bfloat16), torch.bfloat16),
    "norm": (lambda x: (x @ x).norm(), torch.float32),
    "widest": (lambda x: torch.addcmul(x.bfloat16(), x, x.bfloat16()), torch.float32),
    "double": (lambda x: x.double() @ x.double(), torch.float64),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_uses_torchs_lists(name: str) -> None:
    function, dtype = AUTOCAST[name]
    x = randn(8, 8, device=DEVICE)
    with torch.no_grad(), torch.autocast("vgpu", dtype=torch.bfloat16):
        assert function(x).dtype == dtype


def test_one_seed_gives_the_numbers_of_the_cpu() -> None:
    torch.manual_seed(3)
    found = randn(4, device=DEVICE)
    torch.manual_seed(3)
    assert_same(found, randn(4))


def test_a_generator_is_of_the_device_and_repeats() -> None:
    generator = torch.Generator(DEVICE).manual_seed(7)
    assert generator.device == torch.device(DEVICE)
    state = generator.get_state()
    first = randn(3, device=DEVICE, generator=generator)
    generator.set_state(state)
    assert_same(randn(3, device=DEVICE, generator=generator), first.cpu())
    assert_same(first, randn(3, generator=torch.Generator().manual_seed(7)))


def test_a_parameter_moves_by_its_data() -> None:
    parameter = nn.Parameter(randn(4))
    value = parameter.detach().clone()
    parameter.data = parameter.data.to(DEVICE)
    assert parameter.device == torch.device(DEVICE)
    assert_same(parameter, value)


def test_a_tensor_is_set_on_the_storage_of_another() -> None:
    ring = torch.empty(2**16, dtype=torch.uint8, device=DEVICE)
    slot = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    slot.set_(ring.untyped_storage(), 512, (16, 16), (16, 1))
    slot.fill_(3)
    assert ring[1024:1026].view(torch.bfloat16).item() == 3
    assert slot.untyped_storage().data_ptr() == ring.data_ptr()


def test_what_is_saved_is_loaded_where_it_was(tmp_path: object) -> None:
    x = randn(5)
    file = f"{tmp_path}/x.pt"
    torch.save(x.to(DEVICE), file)
    assert torch.load(file).device == torch.device(DEVICE)
    assert_same(torch.load(file), x)
    assert torch.load(file, map_location="cpu").device.type == "cpu"
