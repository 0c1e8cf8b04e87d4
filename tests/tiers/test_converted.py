"""What is converted as it is read has the bytes of what was converted whole."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from distorch.formats import DTYPES, TensorInfo
from distorch.integrations.converting import conversion
from distorch.plan.blocks import Block, Part
from distorch.quant.scale import Scale
from distorch.tiers import converted
from distorch.tiers.converted import ConvertedSource
from distorch.tiers.sources import FileSource

ROWS, COLUMNS = 24, 256
VALUES = np.random.default_rng(0).normal(0, 0.1, (ROWS, COLUMNS)).astype("f4")
DENSE = {"F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.fixture(params=[COLUMNS, 5 * COLUMNS, 1 << 22])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One row at a time, five of 24, and all at once."""
    monkeypatch.setattr(converted, "_CHUNK_ELEMENTS", request.param)
    return int(request.param)


def written(folder: Path) -> TensorInfo:
    path = folder / "w"
    path.write_bytes(b"1234567" + VALUES.tobytes())
    return TensorInfo("w", "F32", VALUES.shape, 7, VALUES.nbytes, path)


def part(dtype: str, first: int = 0, count: int = ROWS, *stack: int) -> Part:
    shape = (count, *stack, COLUMNS)
    nbytes = DTYPES[dtype].nbytes(shape)
    return Part(tensor="w", dtype=dtype, shape=shape, nbytes=nbytes, first_row=first)


def expected(dtype: str, values: np.ndarray = VALUES) -> bytes:
    if dtype in DENSE:
        dense = torch.from_numpy(values).to(DENSE[dtype]).view(torch.uint8)
        return dense.numpy().tobytes()
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype]).tobytes()


@pytest.mark.parametrize("dtype", [*DENSE, "Q8_0", "Q4_1"])
@pytest.mark.usefixtures("chunk")
def test_every_way_of_reading_gives_the_librarys_bytes(dtype: str, tmp_path: Path) -> None:
    info = written(tmp_path)
    source = ConvertedSource(FileSource({"w": info}), {"w": conversion(info, dtype)})
    row_bytes = DTYPES[dtype].nbytes((COLUMNS,))
    whole = expected(dtype)

    out = bytearray(ROWS * row_bytes)
    source.read([(part(dtype), memoryview(out))])
    assert bytes(out) == whole

    some = part(dtype, 7, 11)
    block = Block(name="b", parts=(some,), module=None)
    slot = bytearray(block.slot_bytes)
    source.read_blocks([(block, memoryview(slot))])
    assert slot[: some.nbytes] == whole[7 * row_bytes : 18 * row_bytes]

    out = bytearray(2 * row_bytes)
    source.read_rows(some, [10, 0], memoryview(out))
    assert out[:row_bytes] == whole[17 * row_bytes : 18 * row_bytes]
    assert out[row_bytes:] == whole[7 * row_bytes : 8 * row_bytes]
    source.close()


@pytest.mark.usefixtures("chunk")
def test_the_rows_of_a_stack_are_those_of_all_its_matrices(tmp_path: Path) -> None:
    info = written(tmp_path)
    source = ConvertedSource(FileSource({"w": info}), {"w": conversion(info, "Q8_0")})
    stack = part("Q8_0", 1, 3, 6)  # the last three of four matrices of six rows
    out = bytearray(stack.nbytes)
    source.read([(stack, memoryview(out))])
    assert bytes(out) == expected("Q8_0", VALUES[6:])
    source.close()


@pytest.mark.usefixtures("chunk")
def test_what_is_amended_is_amended_whole_before(tmp_path: Path) -> None:
    def turn(memory: memoryview) -> None:
        assert len(memory) == VALUES.nbytes
        memory[:] = np.frombuffer(memory, "f4").reshape(ROWS, -1)[::-1].tobytes()

    info = written(tmp_path)
    files = FileSource({"w": info}, {"w": turn})
    source = ConvertedSource(files, {"w": conversion(info, "Q8_0")}, {"w"})
    out = bytearray(part("Q8_0").nbytes)
    source.read([(part("Q8_0"), memoryview(out))])
    assert bytes(out) == expected("Q8_0", np.ascontiguousarray(VALUES[::-1]))
    source.close()


@pytest.mark.usefixtures("chunk")
def test_a_scale_is_applied_before(tmp_path: Path) -> None:
    factors = torch.arange(1.0, ROWS + 1).view(ROWS, 1)
    info, scale = written(tmp_path), Scale.fit(factors, VALUES.shape)
    source = ConvertedSource(FileSource({"w": info}), {"w": conversion(info, "F16", scale)})
    rows = part("F16", 5, 3)
    out = bytearray(rows.nbytes)
    source.read([(rows, memoryview(out))])
    assert bytes(out) == expected("F16", (VALUES * factors.numpy())[5:8])
    source.close()
