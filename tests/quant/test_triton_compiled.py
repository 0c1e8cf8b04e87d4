"""What Triton's compilers make of the kernels for cards that are not here, looked at."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from distorch.quant.block_formats import BLOCK_FORMATS
from tests.quant.interpreted import NAMES, sound

pytest.importorskip("triton", reason="no Triton here; on Linux: pip install triton")


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
