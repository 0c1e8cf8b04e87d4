"""What tests of kernels share: threads, and the Triton kernels, to be interpreted on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from distorch.quant import choice

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = Path(choice.__file__).with_name("triton_kernels.py")


@pytest.fixture(autouse=True, scope="module")
def _threads() -> Iterator[None]:
    """Two threads or more, which share the work, also where processes have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


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
