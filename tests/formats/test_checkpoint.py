"""Checkpoints: what a path means, views without copies, maps that are released."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from distorch.errors import FormatError, StorageError
from distorch.formats import Checkpoint, TensorInfo, open_checkpoint
from tests.formats.make import Stored, write_gguf, write_safetensors, write_sharded

SHAPES = {"w": (4, 8), "b": (8,)}


def write_small(path: Path) -> dict[str, Stored]:
    return write_safetensors(path, shapes=SHAPES)


def open_handles(path: Path) -> list[str]:
    """Return the handles and maps of this process on files in a directory."""
    process = psutil.Process()
    in_use = [*process.open_files(), *process.memory_maps(grouped=False)]
    return [file.path for file in in_use if file.path.startswith(str(path))]


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    ],
)
def test_a_directory_means_its_safetensors_file(tmp_path: Path, name: str) -> None:
    write_small(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path == tmp_path / name


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_directory_means_its_index(tmp_path: Path, stem: str) -> None:
    stored = write_sharded(tmp_path, stem=stem)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.path.name == f"{stem}.safetensors.index.json"
    assert set(checkpoint) == set(stored)


def test_a_directory_means_its_only_gguf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert open_checkpoint(tmp_path).format == "gguf"


def test_model_safetensors_wins_in_a_directory_of_several(tmp_path: Path) -> None:
    for name in ("a.safetensors", "model.safetensors"):
        write_small(tmp_path / name)
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"


def test_the_first_bytes_decide_not_the_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.safetensors")
    write_small(tmp_path / "b.gguf")
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "c.txt")
    assert open_checkpoint(tmp_path / "a.safetensors").format == "gguf"
    assert open_checkpoint(tmp_path / "b.gguf").format == "safetensors"
    assert len(open_checkpoint(tmp_path / "c.txt")) == 4


def nothing(_: Path) -> None: ...


def two_files(path: Path) -> None:
    path.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        write_small(path / name)


@pytest.mark.parametrize(
    ("make", "problem", "hint"),
    [
        (nothing, "no such file", "check the path"),
        (Path.mkdir, "holds no checkpoint", "model.safetensors"),
        (two_files, "several checkpoints: a.safetensors, b.safetensors", "name one"),
        (os.mkfifo, "not a regular file", "copy it"),
    ],
)
def test_nothing_to_read_is_a_storage_error(
    tmp_path: Path, make: Callable[[Path], object], problem: str, hint: str
) -> None:
    path = tmp_path / "model"
    make(path)
    with pytest.raises(StorageError) as caught:
        open_checkpoint(path)
    assert caught.value.problem == f"{path}: {problem}" or problem in caught.value.problem
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "problem", "hint"),
    [
        (b"", "empty", "download"),
        (b"Once upon a time", "neither GGUF nor safetensors", ".safetensors"),
        (b"tiny", "neither GGUF nor safetensors", ".safetensors"),
        (b"GGUF", "cut short", "download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page", "login"),
        (b"PK\x03\x04" + bytes(60), "torch.save", "safetensors"),
        (b"\x80\x02}q\x00", "pickle", "safetensors"),
        (b'{"architectures": []}', "not the index", "index.json"),
        (b"{", "not JSON", "download"),
    ],
)
def test_other_files_are_a_format_error(
    tmp_path: Path, content: bytes, problem: str, hint: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.problem
    assert problem in caught.value.problem
    assert hint in caught.value.hint


def test_an_os_error_is_a_storage_error_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write_small(path)

    def refuse(self: Path, _mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        open_checkpoint(path)
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_name_too_long_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="too long"):
        open_checkpoint("x" * 5000)


def test_it_is_a_mapping(tmp_path: Path) -> None:
    write_small(tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint) == {"w", "b"}
    assert len(checkpoint) == 2
    assert isinstance(checkpoint["w"], TensorInfo)
    assert checkpoint.get("x") is None
    assert checkpoint.nbytes == 160
    with pytest.raises(KeyError):
        checkpoint.view("x")


def test_a_view_is_mapped_and_read_only(tmp_path: Path) -> None:
    stored = write_small(tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        view = checkpoint.view("w")
        assert view == stored["w"].data
        assert view.readonly
        assert view.obj is checkpoint.view("b").obj  # one map of the file, no copy of it


def test_headers_need_no_map_and_close_leaves_no_handle(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert open_handles(tmp_path) == []
        views = [checkpoint.view(name) for name in checkpoint]
        assert open_handles(tmp_path) != []
        for view in views:
            view.release()
    assert open_handles(tmp_path) == []
    assert len(checkpoint) == 4  # what the header said stays readable
    with pytest.raises(StorageError, match="closed"):
        checkpoint.view("blocks.1.weight")


def test_a_view_in_use_survives_close_and_takes_its_map_along(tmp_path: Path) -> None:
    stored = write_small(tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    view = checkpoint.view("w")
    checkpoint.close()
    assert view == stored["w"].data
    del view
    assert open_handles(tmp_path) == []


def test_a_refused_file_leaves_no_handle(tmp_path: Path) -> None:
    for name, content in (("a", b"GGUF\3\0\0\0"), ("b", b"\x02" + bytes(7) + b"{"), ("c", b"{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError):
            open_checkpoint(tmp_path / name)
    assert open_handles(tmp_path) == []


@pytest.mark.parametrize("size", [0, 100, None])
def test_a_file_that_changed_is_a_storage_error(tmp_path: Path, size: int | None) -> None:
    path = tmp_path / "m.safetensors"
    write_small(path)
    checkpoint = open_checkpoint(path)
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    with pytest.raises(StorageError):
        checkpoint.view(max(checkpoint, key=lambda name: checkpoint[name].offset))


def test_an_empty_tensor_needs_no_file() -> None:
    info = TensorInfo("e", "F32", (0,), 0, 0, Path("gone"))
    assert Checkpoint(Path("gone"), "gguf", {}, {"e": info}).view("e").nbytes == 0


def test_importing_the_room_loads_no_numpy_and_no_torch() -> None:
    """`distorch --help` and `distorch plan FILE` answer at once."""
    code = (
        "import sys, distorch.formats; print(sorted({'numpy', 'torch', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
