"""The Triton kernels, by Triton's interpreter and by its compilers: there is no GPU here.

The interpreter runs the kernels' source on tensors of the CPU and shows what they compute. What a
GPU would be given is compiled, and looked at. How fast it is, only a GPU can tell.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows

from distorch.quant import choice, dequantize, tensor
from distorch.quant.block_formats import BLOCK_FORMATS
from tests.quant.make import Bytes, random_blocks, same_bits, sound_blocks, with_halves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytest.importorskip("triton", reason="no Triton here; on Linux: pip install triton")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

NAMES = ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F8_E4M3", "F8_E5M2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SOURCE = Path(choice.__file__).with_name("triton_kernels.py")
CPU = torch.device("cpu")
GUARD = 64


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """The kernels, to be interpreted; with bfloat16, which Triton 3.7's interpreter gets wrong.

    It cuts float32 off instead of rounding it, and multiplies the bit patterns in a product.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding(builder: Any, source: Any, to: Any) -> Any:
        data, kinds = np.array(source.data), (source.dtype.scalar, to.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(data).bfloat16().view(torch.int16)
            return TensorHandle(bits.numpy().view(np.uint16), to.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            values = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float()
            return TensorHandle(values.numpy(), to.scalar)
        return cast(builder, source, to)

    def of_numbers(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (rounding(builder, x, tl.float32) for x in (a, b))
        return dot(builder, a, b, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", rounding)
        patch.setattr(InterpreterBuilder, "create_dot", of_numbers)
        spec = importlib.util.spec_from_file_location("interpreted_kernels", SOURCE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as while_defined:
            while_defined.setenv("TRITON_INTERPRET", "1")
            spec.loader.exec_module(module)
        yield module


@pytest.fixture
def on_gpu(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let the CPU count as a GPU, whose compiler is the interpreter; nothing is trusted yet."""
    for function in (choice.gpu_decoder, choice.is_fused):
        function.cache_clear()
    for module in (choice, dequantize, tensor):
        monkeypatch.setattr(module, "GPUS", {"cpu"})
    monkeypatch.setattr(choice, "_kernels", lambda: kernels)
    monkeypatch.setattr(choice, "_current", lambda _device: nullcontext())
    yield monkeypatch
    for function in (choice.gpu_decoder, choice.is_fused):
        function.cache_clear()


def by_kernel(kernels: Any, name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
    form = BLOCK_FORMATS[name]
    out = torch.full((packed.numel() // form.nbytes * form.elements + GUARD,), 7.0, dtype=dtype)
    kernels.decode(packed.view(-1), form, out[:-GUARD])
    assert bool((out[-GUARD:] == 7.0).all()), "the kernel wrote past its end"
    return out[:-GUARD]


def by_torch(name: str, packed: Tensor, dtype: torch.dtype) -> Tensor:
    form = BLOCK_FORMATS[name]
    return form.decode(packed.view(-1, form.nbytes)).to(dtype)


def sound(name: str, rows: int, columns: int) -> Tensor:
    """Rows of blocks without infinity or NaN."""
    blocks = sound_blocks(name, rows * columns // BLOCK_FORMATS[name].elements)
    if name.startswith("F8"):
        blocks = blocks & 0xBF
    return torch.from_numpy(blocks).view(-1)


def test_all_that_people_use_has_a_kernel(kernels: Any) -> None:
    assert list(kernels.FORMATS) == NAMES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_gives_the_torch_decoders_bits(
    kernels: Any, name: str, dtype: torch.dtype
) -> None:
    """A part of a tile, and tiles and a part; all bytes, and sound ones."""
    for weights in (3840, 8480):
        num_blocks = weights // BLOCK_FORMATS[name].elements
        for make in (random_blocks, sound_blocks):
            packed = torch.from_numpy(make(name, num_blocks, seed=num_blocks))
            found = by_kernel(kernels, name, packed, dtype)
            assert same_bits(found, by_torch(name, packed, dtype)), (num_blocks, make)
    assert by_kernel(kernels, name, torch.empty(0, dtype=torch.uint8), dtype).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[:5])
def test_scales_that_are_zero_denormal_infinite_or_no_number(
    kernels: Any, name: str, dtype: torch.dtype
) -> None:
    scales = [0, 0x8000, 1, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF]
    halves = np.array(scales, np.uint16)
    packed = torch.from_numpy(with_halves(name, random_blocks(name, len(scales)), halves))
    assert same_bits(by_kernel(kernels, name, packed, dtype), by_torch(name, packed, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[5:])
def test_every_number_of_fp8(kernels: Any, name: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    assert same_bits(by_kernel(kernels, name, packed, dtype), by_torch(name, packed, dtype))


def test_blocks_at_an_odd_address_are_moved_first(kernels: Any) -> None:
    """A GPU reads float16 at even addresses only."""
    blocks = sound("Q4_K", 3, 256)
    odd = torch.cat((blocks[:1], blocks))[1:]
    assert odd.data_ptr() % 2 == 1
    assert kernels._even(odd).data_ptr() % 2 == 0
    assert kernels._even(blocks) is blocks
    assert same_bits(
        by_kernel(kernels, "Q4_K", odd, torch.float32), by_torch("Q4_K", blocks, torch.float32)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_product_is_as_near_as_sums_in_float32_can_be(
    kernels: Any, name: str, dtype: torch.dtype
) -> None:
    """Outputs that are no whole tile; columns that are no whole step, where a format has them."""
    form, outputs = BLOCK_FORMATS[name], 37
    columns = {256: 512, 32: 288, 1: 300}[form.elements]
    packed = sound(name, outputs, columns)
    weight = by_torch(name, packed, dtype).view(outputs, columns).double()
    random = torch.Generator().manual_seed(0)
    for rows, bias in ((1, None), (16, torch.randn(outputs, generator=random).to(dtype))):
        x = torch.randn(rows, columns, generator=random).to(dtype)
        y = kernels.linear(x, packed, form, bias)
        assert (y.dtype, y.shape) == (dtype, (rows, outputs))
        added = torch.zeros(outputs) if bias is None else bias
        exact = x.double() @ weight.T + added.double()
        size = x.double().abs() @ weight.abs().T + added.double().abs()
        bound = columns * 2.0**-24 * size + torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
        assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_or_written_past_the_ends(
    kernels: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    touched: list[Bytes] = []

    def noted(usual: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def access(builder: Any, *arguments: Any) -> Any:
            mask = arguments[mask_at].data
            touched.append(np.broadcast_to(arguments[0].data, mask.shape)[mask])
            return usual(builder, *arguments)

        return access

    for access, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
        usual = getattr(InterpreterBuilder, access)
        monkeypatch.setattr(InterpreterBuilder, access, noted(usual, mask_at))
    form, columns = BLOCK_FORMATS[name], {256: 512, 32: 288, 1: 300}[BLOCK_FORMATS[name].elements]
    packed, x, bias = sound(name, 19, columns), torch.randn(3, columns), torch.randn(19)
    out = torch.empty(19 * columns)
    kernels.decode(packed, form, out)
    y = kernels.linear(x, packed, form, bias)
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (packed, x, bias, out, y)]
    addresses = np.concatenate(touched)
    inside = [(first <= addresses) & (addresses < last) for first, last in ends]
    assert np.any(inside, axis=0).all()
    assert all(where.any() for where in inside)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F8_E4M3"])
def test_a_product_does_not_depend_on_what_is_computed_beside_it(kernels: Any, name: str) -> None:
    """Not on the other rows of the input, nor on which rows of the weight are in a run."""
    form, outputs, columns = BLOCK_FORMATS[name], 48, 512
    packed = sound(name, outputs, columns)
    x = torch.randn(16, columns).bfloat16()
    y = kernels.linear(x, packed, form, None)
    assert torch.equal(kernels.linear(x, packed, form, None), y)
    assert torch.equal(kernels.linear(x[3:5], packed, form, None), y[3:5])
    run = packed[20 * len(packed) // outputs :]
    assert torch.equal(kernels.linear(x, run, form, None), y[:, 20:])


class Compiled:
    """Stands before a kernel: what a launch asks for is compiled, and not launched."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options, self.asm = kernel, options, dict[str, str]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **given: Any) -> None:
            self.asm = self.kernel.warmup(*arguments, grid=grid, **given | self.options).asm

        return launch


@dataclass
class Card:
    """A GPU that is not here, as far as Triton's compilers ask for it."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        """A number that no real card has: Triton keeps what it compiled by it."""
        return 1000 if self.target.backend == "cuda" else 1001

    def get_current_stream(self, _device: int) -> int:
        return 0


Compile = Callable[..., dict[str, str]]


@pytest.fixture
def compile_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compile:
    """Compile what ``decode`` and ``linear`` would launch on a card, into bfloat16 or a dtype."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from distorch.quant import triton_kernels

    def compiled(
        what: str,
        name: str,
        target: tuple[str, Any, int] = ("cuda", 80, 32),
        dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> dict[str, str]:
        monkeypatch.setattr(driver, "_active", Card(GPUTarget(*target)))
        kernel = Compiled(getattr(triton_kernels, f"_{what}"), options)
        packed = sound(name, 16, 512)
        with monkeypatch.context() as patch:
            patch.setattr(triton_kernels, f"_{what}", kernel)
            if what == "decode":
                triton_kernels.decode(packed, BLOCK_FORMATS[name], torch.empty(8192, dtype=dtype))
            else:
                x = torch.zeros(3, 512, dtype=dtype)
                triton_kernels.linear(x, packed, BLOCK_FORMATS[name], None)
        return kernel.asm

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compiled


def counted(ptx: str) -> Counter[str]:
    """How often each instruction of a kind is there."""
    kinds = r"fma|mma|st\.global|cvt\.rn\.bf16"
    return Counter(re.findall(rf"^\s+(?:@\S+ )?({kinds})", ptx, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_compiles_for_nvidia_without_joining_roundings(
    compile_for: Compile, name: str
) -> None:
    found = counted(compile_for("decode", name)["ptx"])
    assert not found["fma"]
    assert found["cvt.rn.bf16"], "numbers are rounded to the nearest by the hardware"
    assert found["st.global"] == 4, "4,096 numbers of 2 bytes, 16 bytes a thread at a time"


def test_joined_roundings_would_be_seen(compile_for: Compile) -> None:
    assert counted(compile_for("decode", "Q4_K", enable_fp_fusion=True)["ptx"])["fma"]


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F8_E4M3"])
def test_products_compile_for_nvidia_with_tensor_cores(compile_for: Compile, name: str) -> None:
    found = counted(compile_for("linear", name)["ptx"])
    assert found["mma"]
    assert not found["fma"]


def test_products_in_float32_are_not_rounded_to_less(compile_for: Compile) -> None:
    """Not to TF32, as tensor cores would."""
    found = counted(compile_for("linear", "Q4_0", dtype=torch.float32)["ptx"])
    assert found["fma"]
    assert not found["mma"]


def test_decoding_compiles_for_amd_without_joining_roundings(compile_for: Compile) -> None:
    assembly = compile_for("decode", "Q4_K", ("hip", "gfx1100", 32))["amdgcn"]
    assert "v_mul_f32" in assembly
    assert not re.search(r"v_(pk_)?(fma|fmac|mad|mac)\w*_f32", assembly)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F8_E5M2"])
def test_a_kernel_that_agrees_decodes_and_is_named(name: str) -> None:
    form, packed = BLOCK_FORMATS[name], sound(name, 5, 256)
    for dtype in DTYPES:
        out = torch.empty(5 * 256, dtype=dtype)
        dequantize._decode_on_gpu(packed, name, out)
        assert same_bits(out, by_torch(name, packed, dtype))
        assert choice.gpu_decoder(name, CPU, dtype) is not None
        assert dequantize.decoder_of(form, "cpu", dtype) == "Triton kernel"
    assert choice.gpu_decoder(name, CPU, torch.float64) is None
    assert choice.gpu_decoder("IQ2_S", CPU, torch.float32) is None


class Stumbling:
    """Kernels that are wrong, or that no compiler takes."""

    MAX_ROWS = 16
    FORMATS = ("Q4_K",)

    def __init__(self, kernels: Any, error: Exception | None, *, wrong: str = "") -> None:
        self.kernels, self.error, self.wrong = kernels, error, wrong

    def decode(self, packed: Tensor, form: Any, out: Tensor) -> None:
        if self.error is not None:
            raise self.error
        self.kernels.decode(packed, form, out)
        if self.wrong == "decode":
            out.view(torch.int16)[-1] ^= 1

    def linear(self, *arguments: Any) -> Tensor:
        y: Tensor = self.kernels.linear(*arguments)
        return y * 1.05 if self.wrong == "linear" else y


@pytest.mark.parametrize("error", [None, RuntimeError("no C compiler\nmore")])
def test_a_kernel_that_errs_is_not_used_and_torch_decodes(
    on_gpu: pytest.MonkeyPatch,
    kernels: Any,
    error: Exception | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    on_gpu.setattr(choice, "_kernels", lambda: Stumbling(kernels, error, wrong="decode"))
    packed, out = sound("Q4_K", 5, 256), torch.empty(5 * 256, dtype=torch.bfloat16)
    for _ in range(2):
        dequantize._decode_on_gpu(packed, "Q4_K", out)
        assert same_bits(out, by_torch("Q4_K", packed, torch.bfloat16))
    why = "RuntimeError: no C compiler" if error else "other bits than torch's"
    expected = f"Triton's decoding of Q4_K is not used here ({why}): torch instead, slower"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_without_triton_torch_decodes_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'")

    choice._kernels.cache_clear()
    choice.gpu_decoder.cache_clear()
    monkeypatch.setattr(choice, "import_module", absent)
    try:
        for name in NAMES:
            assert dequantize.decoder_of(BLOCK_FORMATS[name], "cuda:0") == "torch"
    finally:
        choice._kernels.cache_clear()
        choice.gpu_decoder.cache_clear()
    expected = "no Triton here (No module named 'triton'): torch decodes instead, slower"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_triton_is_not_imported_where_no_gpu_computes() -> None:
    code = """
        import sys, torch
        from distorch.quant.block_formats import BLOCK_FORMATS
        from distorch.quant.tensor import QuantTensor
        blocks = torch.zeros(34, dtype=torch.uint8)
        QuantTensor(blocks, BLOCK_FORMATS["Q8_0"], (1, 32), torch.float32).materialize()
        assert "triton" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=100)


def weight_of(name: str, outputs: int, columns: int, dtype: torch.dtype) -> tensor.QuantTensor:
    packed = sound(name, outputs, columns)
    return tensor.QuantTensor(packed, BLOCK_FORMATS[name], (outputs, columns), dtype)


@pytest.mark.parametrize("name", ["Q4_K", "F8_E4M3"])
def test_few_rows_are_multiplied_by_one_kernel_where_that_is_asked_for(
    on_gpu: pytest.MonkeyPatch, kernels: Any, name: str
) -> None:
    weight = weight_of(name, 24, 512, torch.bfloat16)
    x, bias = torch.randn(2, 3, 512).bfloat16(), torch.randn(24).bfloat16()
    whole = F.linear(x, weight.materialize(), bias)
    assert torch.equal(F.linear(x, weight, bias), whole), "not asked for"
    choice.is_fused.cache_clear()
    on_gpu.setenv("DISTORCH_FUSED", "1")
    fused = F.linear(x, weight, bias)
    expected = kernels.linear(x.view(6, 512), weight.packed, weight.form, bias)
    assert torch.equal(fused, expected.view(2, 3, 24))
    named = dequantize.decoder_of(weight.form, "cpu", torch.bfloat16)
    assert named == "Triton kernel, fused for few rows"


def test_a_product_that_is_not_for_the_kernel_is_left_to_torch(on_gpu: pytest.MonkeyPatch) -> None:
    """More rows, none, a gradient to track, a bias that is packed."""
    on_gpu.setenv("DISTORCH_FUSED", "1")
    weight = weight_of("Q4_K", 24, 512, torch.float32)
    assert choice.few_rows(torch.randn(16, 512), weight.packed, weight.form, None) is not None
    assert choice.few_rows(torch.randn(17, 512), weight.packed, weight.form, None) is None
    assert choice.few_rows(torch.randn(0, 512), weight.packed, weight.form, None) is None
    x = torch.randn(2, 512, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert x.grad is not None
    packed = tensor.QuantTensor(
        torch.ones(96, dtype=torch.uint8), BLOCK_FORMATS["F32"], (24,), x.dtype
    )
    expected = F.linear(x, weight.materialize(), packed.materialize())
    assert torch.equal(F.linear(x.detach(), weight, packed), expected)


def test_a_product_that_is_off_is_not_used(
    on_gpu: pytest.MonkeyPatch, kernels: Any, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu.setenv("DISTORCH_FUSED", "1")
    on_gpu.setattr(choice, "_kernels", lambda: Stumbling(kernels, None, wrong="linear"))
    weight = weight_of("Q4_K", 24, 512, torch.bfloat16)
    x = torch.randn(1, 512).bfloat16()
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.materialize()))
    assert "Triton's product with Q4_K is not used here" in caplog.text
