"""Files that are written: the bits of the quantiser, in bounded memory, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import gguf
import libgguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distorch import open_checkpoint
from distorch.convert import convert, write
from distorch.errors import DistorchError, MissingExtraError, ModelError, StorageError
from distorch.integrations.comfyui import gguf_names
from distorch.quant.block_formats import BLOCK_FORMATS
from tests.convert.make import FLUX, flux, save
from tests.formats.make import write_sharded

# All that libgguf packs without knowing which weights matter.
PACKED = [
    kind.name
    for kind in libgguf.GGMLQuantizationType
    if kind.name in BLOCK_FORMATS.keys() - {"F32", "F16", "BF16"}
    and libgguf.row_size(kind, 256)
    and not libgguf.quantize_requires_imatrix(kind)
]
SOURCE = Path(__file__).parents[2] / "src"
MAX_BYTES = 200 << 20


def arrays(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("form", PACKED)
def test_packed_bits_are_those_of_the_whole_matrix_at_once(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = flux()
    source, out = save(tmp_path / "in.safetensors", weights), tmp_path / "out.gguf"
    monkeypatch.setattr(write, "_CHUNK_ELEMENTS", 1000)  # less than a row, and no multiple of one
    done = convert(source, out, form)
    found = arrays(out)
    for name in (FLUX, "double_blocks.0.img_mlp.0.weight"):
        expected = libgguf.quantize_rows(
            weights[name].float().numpy(), libgguf.GGMLQuantizationType[form]
        )
        assert found[name].tensor_type.name == form
        assert np.array_equal(found[name].data, expected)
        with open_checkpoint(out) as checkpoint:
            assert checkpoint[name].shape == tuple(weights[name].shape)
            assert bytes(checkpoint.view(name)) == expected.tobytes()
    assert done.written_bytes == out.stat().st_size
    assert done.read_bytes == sum(weight.nbytes for weight in weights.values())


def test_what_is_not_packed_has_the_same_numbers(tmp_path: Path) -> None:
    weights = flux(scalar=torch.tensor(2.5), ids=torch.arange(5))
    out = tmp_path / "out.gguf"
    convert(save(tmp_path / "in.safetensors", weights), out, "Q4_K")
    with open_checkpoint(out) as checkpoint:
        assert set(checkpoint) == set(weights)
        for name in set(weights) - {FLUX, "double_blocks.0.img_mlp.0.weight"}:
            info, view = checkpoint[name], np.frombuffer(checkpoint.view(name), np.uint8)
            raw = torch.from_numpy(view.copy())
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}[info.dtype]
            found = raw.view(dtype).reshape(weights[name].shape)
            assert torch.equal(found.double(), weights[name].double())


def test_the_header_says_what_loaders_ask(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(save(tmp_path / "in.safetensors", flux()), out, "Q4_K")
    with open_checkpoint(out) as checkpoint:
        metadata = checkpoint.metadata
        assert metadata["general.architecture"] == "flux"
        assert metadata["general.quantization_version"] == gguf.GGML_QUANT_VERSION
        assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_S
        assert not gguf_names.is_language_model(metadata)
        assert not any(info.offset % 32 for info in checkpoint.values())


def test_folded_convolutions_come_back_in_their_shapes(tmp_path: Path) -> None:
    weights = {
        "label_emb.0.0.weight": torch.randn(64, 128),
        "input_blocks.1.0.in_layers.2.weight": torch.randn(64, 32, 3, 3),
    }
    out, back = tmp_path / "out.gguf", tmp_path / "back.safetensors"
    convert(save(tmp_path / "in.safetensors", weights), out, "Q8_0")
    with open_checkpoint(out) as checkpoint:
        shapes = gguf_names.shapes(checkpoint, checkpoint.metadata)
        assert shapes == {name: tuple(weight.shape) for name, weight in weights.items()}
    field = gguf.GGUFReader(out).get_field(
        "comfy.gguf.orig_shape.input_blocks.1.0.in_layers.2.weight"
    )
    assert field is not None
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]  # as ComfyUI asks
    convert(out, back, "f32")
    for name, weight in load_file(back).items():
        assert weight.shape == weights[name].shape
        assert torch.allclose(weight, weights[name], atol=0.03)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("f32", torch.float32),
        ("f16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp8_e4m3fn", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
    ],
)
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_changes_are_torchs_casts(
    form: str, dtype: torch.dtype, source_dtype: torch.dtype, tmp_path: Path
) -> None:
    weights = {"w": torch.randn(70, 33).to(source_dtype), "ids": torch.arange(7)}
    source, out = save(tmp_path / "in.safetensors", weights), tmp_path / "out.safetensors"
    convert(source, out, form)
    found = load_file(out)
    assert found["w"].dtype == dtype
    assert bits(found["w"]) == bits(weights["w"].float().to(dtype))
    assert torch.equal(found["ids"], weights["ids"])
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "tiny"}


@settings(max_examples=30, deadline=None)
@given(
    chunk=st.integers(1, 3000),
    form=st.sampled_from(["Q8_0", "Q4_0", "F16"]),
    source=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
)
def test_chunks_change_no_bit(chunk: int, form: str, source: torch.dtype) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        path = save(Path(name, "in.safetensors"), {FLUX: torch.randn(40, 96).to(source)})
        whole, cut = Path(name, "whole.gguf"), Path(name, "cut.gguf")
        convert(path, whole, form)
        patch.setattr(write, "_CHUNK_ELEMENTS", chunk)
        convert(path, cut, form)
        assert whole.read_bytes() == cut.read_bytes()


def test_shards_become_one_file(tmp_path: Path) -> None:
    stored = write_sharded(tmp_path)
    out = tmp_path / "out.safetensors"
    done = convert(tmp_path, out, "f32")
    with open_checkpoint(out) as checkpoint:
        assert {name: info.shape for name, info in checkpoint.items()} == {
            name: tensor.shape for name, tensor in stored.items()
        }
    assert done.recipe.metadata == {"format": "pt"}


def test_packed_weights_are_decoded_with_a_word_and_those_of_the_format_copied(
    tmp_path: Path,
) -> None:
    first, again, other = (tmp_path / f"{name}.gguf" for name in ("first", "again", "other"))
    convert(save(tmp_path / "in.safetensors", flux()), first, "Q8_0")
    copied = convert(first, again, "Q8_0")
    assert first.read_bytes() == again.read_bytes()
    assert not any("decoded" in note for note in copied.recipe.notes)
    decoded = convert(first, other, "Q4_K")
    assert any("2 tensors decoded from packed weights" in note for note in decoded.recipe.notes)
    values = gguf.quants.dequantize(arrays(first)[FLUX].data, gguf.GGMLQuantizationType.Q8_0)
    expected = libgguf.quantize_rows(values, libgguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(arrays(other)[FLUX].data, expected)


@pytest.mark.parametrize("form", ["Q4_K", "Q8_0", "F16"])
def test_weights_that_are_no_numbers_are_named(form: str, tmp_path: Path) -> None:
    weights = flux(torch.float32)
    weights[FLUX][3, 5:7] = torch.tensor([torch.nan, torch.inf])
    weights["double_blocks.0.img_attn.proj.bias"][1] = -torch.inf
    done = convert(save(tmp_path / "in.safetensors", weights), tmp_path / "out.gguf", form)
    assert +done.nonfinite == {FLUX: 2, "double_blocks.0.img_attn.proj.bias": 1}


@pytest.mark.parametrize(
    ("form", "large"), [("f16", 70000.0), ("fp8_e4m3fn", 500.0), ("Q8_0", 9e6)]
)
def test_weights_that_a_format_is_too_narrow_for_are_named(
    form: str, large: float, tmp_path: Path
) -> None:
    weights = flux(torch.float32)
    weights[FLUX][0, 0] = large
    out = tmp_path / ("out.gguf" if form == "Q8_0" else "out.safetensors")
    done = convert(save(tmp_path / "in.safetensors", weights), out, form)
    assert set(+done.overflowed) == {FLUX}
    assert not +done.nonfinite


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    source = save(tmp_path / "in.safetensors", flux())
    convert(source, tmp_path / "o.gguf", "Q8_0", progress=lambda *at: calls.append(at))
    total = sum(weight.nbytes for weight in flux().values())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total_bytes for _, total_bytes in calls} == {total}
    assert calls[-1][0] == total


def test_a_target_that_is_there_is_left_unless_asked(tmp_path: Path) -> None:
    source, out = save(tmp_path / "in.safetensors", flux()), tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(StorageError, match="there already") as caught:
        convert(source, out, "Q8_0")
    assert "--overwrite" in caught.value.hint
    assert out.read_bytes() == b"precious"
    convert(source, out, "Q8_0", overwrite=True)
    assert FLUX in arrays(out)


def test_no_target_that_is_the_source_or_no_file(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", flux())
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    for name in ("in.safetensors", "link.safetensors"):
        with pytest.raises(StorageError, match="is IN itself"):
            convert(source, tmp_path / name, "f16", overwrite=True)
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(StorageError, match="is a folder"):
        convert(source, tmp_path / "folder.gguf", "Q8_0")
    with pytest.raises(StorageError, match="is no folder"):
        convert(source, tmp_path / "missing" / "o.gguf", "Q8_0")
    assert source.read_bytes() == before


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=1 << 40, used=0, free=12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    source = save(tmp_path / "in.safetensors", flux())
    with pytest.raises(StorageError, match=r"takes [\d,]+ bytes, and 12,345 are free"):
        convert(source, tmp_path / "o.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_without_libgguf_only_packing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "libgguf", None)
    source = save(tmp_path / "in.safetensors", flux())
    with pytest.raises(MissingExtraError) as caught:
        convert(source, tmp_path / "o.gguf", "Q4_K")
    assert caught.value.hint == 'pip install "distorch[convert]"'
    convert(source, tmp_path / "o.gguf", "F16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "o.gguf"]


@pytest.mark.parametrize("form", ["IQ2_XXS", "IQ2_XS", "IQ1_S", "Q8_K", "Q1_0"])
def test_formats_that_need_more_than_weights_are_refused(form: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", flux())
    with pytest.raises(ModelError, match=form) as caught:
        convert(source, tmp_path / "o.gguf", form)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("data", [b"", b"no model", b"GGUF", b"\x02\0\0\0\0\0\0\0{}"])
def test_no_checkpoint_leaves_no_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.safetensors").write_bytes(data)
    with pytest.raises(DistorchError) as caught:
        convert(tmp_path / "in.safetensors", tmp_path / "o.gguf", "Q8_0")
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_a_source_that_shrinks_meanwhile_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "_CHUNK_ELEMENTS", 4096)
    source = save(tmp_path / "in.safetensors", flux())
    with pytest.raises(StorageError, match="has shrunk"):
        convert(
            source, tmp_path / "o.gguf", "Q8_0",
            progress=lambda *_: os.truncate(source, 4096),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    large = torch.zeros(4096, 8192, dtype=torch.bfloat16)  # seconds of Q4_K
    source = save(tmp_path / "in.safetensors", {FLUX: large.normal_()})
    command = [sys.executable, "-m", "distorch", "convert", source, tmp_path / "o.gguf"]
    process = subprocess.Popen(
        [*map(str, command), "--format", "Q4_K"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stderr=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + 100
    while not list(tmp_path.glob(".o.gguf.*")) and time.monotonic() < give_up:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


_PEAK = """
import json, resource, sys
from distorch.convert import convert
small, large, out, form = sys.argv[1:]
convert(small, out, form, overwrite=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(large, out, form, overwrite=True)
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


@pytest.mark.parametrize("form", ["Q8_0", "F16"])
def test_memory_does_not_grow_with_the_tensor(form: str, tmp_path: Path) -> None:
    small = save(tmp_path / "small.safetensors", {FLUX: torch.randn(64, 64)})
    embedding = torch.empty(40000, 4096, dtype=torch.bfloat16).normal_()  # 312 MiB
    large = tmp_path / "large.safetensors"
    save_file({FLUX: embedding}, large)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, small, large, tmp_path / "out.gguf", form],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = json.loads(done.stdout)
    assert embedding.nbytes > 1.5 * MAX_BYTES
    assert (after - before) << 10 < MAX_BYTES
