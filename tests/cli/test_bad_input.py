"""Bad input: one message that says what to do, and the right exit code."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

import distorch
from distorch.cli import inspect
from tests.cli.make import invoke, tiny_llama
from tests.formats.make import gguf_parts, tensor, write_gguf, write_safetensors

Spoil = Callable[[Path], Path]


def _nothing(folder: Path) -> Path:
    return folder / "missing.gguf"


def _no_model(folder: Path) -> Path:
    (folder / "notes.txt").write_text("nothing here")
    return folder


def _written(name: str, data: bytes) -> Spoil:
    def spoil(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return spoil


def _good(folder: Path, name: str) -> Path:
    if name.endswith(".gguf"):
        write_gguf(folder / name)
    else:
        write_safetensors(folder / name)
    return folder / name


def _cut(name: str) -> Spoil:
    def spoil(folder: Path) -> Path:
        path = _good(folder, name)
        path.write_bytes(path.read_bytes()[:-100])
        return path

    return spoil


def _flipped(name: str, position: int) -> Spoil:
    def spoil(folder: Path) -> Path:
        path = _good(folder, name)
        data = bytearray(path.read_bytes())
        data[position] ^= 0x80
        path.write_bytes(data)
        return path

    return spoil


BAD_FILES = {
    "missing": (_nothing, "no such file"),
    "no model": (_no_model, "holds no checkpoint"),
    "empty": (_written("model.gguf", b""), "empty"),
    "text": (_written("model.gguf", b"Dear reader, this is no model."), "neither GGUF nor"),
    "cut gguf": (_cut("m.gguf"), "cut short"),
    "cut safetensors": (_cut("m.safetensors"), "cut short"),
    "flipped gguf": (_flipped("m.gguf", 13), "GGUF|entries|tensors|cut|header"),
    "flipped safetensors": (_flipped("m.safetensors", 2), "header"),
    "unknown type": (_written("m.gguf", b"".join(gguf_parts([], [tensor(kind=99)]))), "type 99"),
}


@pytest.mark.parametrize("command", ["inspect", "plan", "run"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_with_what_to_do(tmp_path: Path, command: str, kind: str) -> None:
    spoil, problem = BAD_FILES[kind]
    path = spoil(tmp_path)
    done = invoke(command, path, *(["--prompt", "x"] if command == "run" else []))
    assert done.code == 2
    assert done.out == ""
    assert str(path) in done.err
    assert any(word in done.err for word in problem.split("|"))
    assert "\n  try: " in done.err
    assert len(done.err.splitlines()) == 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def _refuse(*arguments: object) -> str:
    done = invoke(*arguments)
    assert (done.code, done.out) == (2, "")
    return done.err


@pytest.mark.parametrize("command", [["plan"], ["run", "--prompt", "x"]])
def test_a_wrong_request_is_an_error(llama: Path, command: list[str]) -> None:
    at = (*command, llama)
    err = _refuse(*at, "--allocation", "cpu,2.5gbb;disk,*")
    line, caret, hint = err.splitlines()
    assert line == "cpu,2.5gbb;disk,*"
    assert caret.startswith("       ^^^ unknown unit 'gbb'")
    assert "try: " in hint
    err = _refuse(*at, "--allocation", "cpu,*", "--virtual-vram", 1)
    assert "--allocation and --virtual-vram" in err
    assert "--virtual-vram" in _refuse(*at, "--donor", "disk")
    err = _refuse(*at, "--allocation", "cpu,0b;disk,*", "--ring", "1kb")
    assert "a ring of" in err
    assert "try: " in err
    for ring in ("50%", "0.5", "much", "*", "1gb;cpu,1gb", "-1mb"):
        assert "--ring 200mb" in _refuse(*at, "--ring", ring)
    assert "'cuda:7'" in _refuse(*at, "--allocation", "cuda:7,1gb;cpu,*")
    assert "virtual_vram_gb is -1" in _refuse(*at, "--virtual-vram", -1)


def test_an_empty_prompt_is_an_error(llama: Path) -> None:
    done = invoke("run", llama, "--prompt", "")
    assert done.code == 2
    assert "the prompt is empty" in done.err


def test_an_unknown_architecture_is_an_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    err = _refuse("run", tmp_path / "m.gguf", "--prompt", "x")
    assert "architecture 'tiny'" in err
    assert "try: " in err


def test_a_block_format_that_nobody_computes_is_an_error(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", "Q8_1")
    done = invoke("run", tmp_path / "m.gguf", "--prompt", "x")
    assert done.code == 2
    assert "Q8_1" in done.err
    assert "try: " in done.err


def write_llama(path: Path, form: str) -> None:
    """Write a Llama of one layer whose matrices are of one block format; all of it is zeros."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    names = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down"
    kind = gguf.GGMLQuantizationType[form]
    zeros = np.zeros(gguf.quant_shape_to_byte_shape((256, 256), kind), np.uint8)
    for name in ["token_embd", "output", *(f"blk.0.{name}" for name in names.split())]:
        writer.add_tensor(f"{name}.weight", zeros, raw_dtype=kind)
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("x"), 1, "fault of DisTorch"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), 2, "/some/file: No space"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_nothing_ends_in_a_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "open_checkpoint", fail)
    monkeypatch.delenv("DISTORCH_DEBUG", raising=False)
    done = invoke("inspect", "model.gguf")
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert "Traceback" not in done.err
    monkeypatch.setenv("DISTORCH_DEBUG", "1")
    assert "Traceback" in invoke("inspect", "model.gguf").err


def test_usage_is_explained() -> None:
    assert invoke("run", "model.gguf").code == 2
    assert "--prompt" in invoke("run", "model.gguf").err
    assert invoke("inspect").code == 2
    assert invoke("dance").code == 2
    alone = invoke()
    assert (alone.code, alone.out) == (0, invoke("--help").out)
    assert 'distorch run demo --allocation "cpu,64mb;disk,*"' in alone.out
    assert invoke("--version").out == f"distorch {distorch.__version__}\n"


def test_every_command_shows_examples() -> None:
    for command in ("run", "plan", "inspect"):
        assert f"Examples:\n    distorch {command} " in invoke(command, "--help").out
