"""Who decodes on a GPU, for which the CPU stands: a kernel that gave torch's bits, else torch."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows

from distorch.quant import choice, dequantize, tensor
from distorch.quant.block_formats import BLOCK_FORMATS
from tests.quant.interpreted import DTYPES, NAMES, by_torch, sound
from tests.quant.make import same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytest.importorskip("triton", reason="no Triton here; on Linux: pip install triton")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
CPU = torch.device("cpu")


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
