"""Tiny models of real architectures in GGUF: ours equals transformers' own reading of the file."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import distorch
from distorch.errors import DistorchError, FormatError, ModelError
from distorch.integrations.resting import RestingWeight
from tests.integrations.huggingface.make import CASES, INNER, NUM_LAYERS, WIDTH, write
from tests.integrations.make import leaving_nothing_open

ALLOCATIONS = ["cpu,*", "cpu,50%;disk,50%", "cpu,0b;disk,*"]
GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


_written: dict[str, tuple[Path, PreTrainedModel]] = {}


def written(name: str, folder: Path) -> tuple[Path, PreTrainedModel]:
    """The file of a case, and what transformers makes of it: each made once."""
    if name not in _written:
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.gguf"
        write(path, CASES[name])
        oracle = (
            CASES[name]
            .library.from_pretrained(
                folder, gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
            .eval()
        )
        _written[name] = path, oracle
    return _written[name]


def outputs(model: PreTrainedModel, vocabulary: int) -> list[torch.Tensor]:
    """Logits of one, five and forty tokens, and a greedy continuation with its logits."""
    generator = torch.Generator().manual_seed(3)
    found = []
    with torch.inference_mode():
        for count in (1, 5, 40):
            ids = torch.randint(3, vocabulary, (1, count), generator=generator)
            found.append(model(ids)[0])
        if not model.can_generate():
            return found
        made = model.generate(  # type: ignore[operator]
            ids[:, :5],
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return [*found, made.sequences, torch.stack(made.logits)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_transformers_bits_in_every_allocation(
    name: str, folder: Path
) -> None:
    path, oracle = written(name, folder)
    expected = outputs(oracle, CASES[name].vocabulary)
    model = distorch.load(path, ALLOCATIONS[0])
    assert type(model) is type(oracle)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    handle = distorch.handle_of(model)
    for line in ALLOCATIONS:
        if line != ALLOCATIONS[0]:
            handle.rebudget(line)
        assert all(same(outputs(model, CASES[name].vocabulary), expected)), line
        assert handle.weight_bytes == handle.plan.bytes_by_tier["cpu"] + handle.plan.ring.nbytes
    handle.remove()
    assert all(same(outputs(model, CASES[name].vocabulary), expected))


@pytest.mark.parametrize("name", CASES)
def test_configuration_buffers_and_names_are_transformers(name: str, folder: Path) -> None:
    path, oracle = written(name, folder)
    model = distorch.load(path, "cpu,0b;disk,*")
    try:
        ignored = {"_name_or_path", "dtype", "torch_dtype", "quantization_config"}
        ours, theirs = model.config.to_dict(), oracle.config.to_dict()
        different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert different <= ignored
        buffers = dict(model.named_buffers())
        for key, value in oracle.named_buffers():
            assert torch.equal(buffers.pop(key), value), key
        assert not buffers
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in oracle.named_parameters()]
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in oracle.named_parameters()
        }
        for setting in GENERATION if model.can_generate() else ():
            found = getattr(model.generation_config, setting)
            assert found == getattr(oracle.generation_config, setting)
    finally:
        distorch.handle_of(model).remove()


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_each_weight_is_what_transformers_reads(name: str, folder: Path) -> None:
    """Also those that the plain logits might hide: norms, permuted heads, biases."""
    path, oracle = written(name, folder)
    model = distorch.load(path, "cpu,0b;disk,*")
    expected = dict(oracle.named_parameters())
    for key, weight in model.named_parameters():
        assert isinstance(weight, (RestingWeight, torch.Tensor))
        assert torch.equal(weight + 0, expected[key]), key
    distorch.handle_of(model).remove()


def test_a_ring_smaller_than_the_head_splits_it_by_rows(folder: Path) -> None:
    path, _ = written("llama, untied, 17k tokens", folder)
    model = distorch.load(path, "cpu,0b;disk,*")
    plan = distorch.handle_of(model).plan
    head = [p.block for p in plan.placements if p.block.parts[0].tensor == "lm_head.weight"]
    assert len(head) > 1
    assert plan.ring.slot_bytes < sum(block.nbytes for block in head)
    distorch.handle_of(model).remove()


def change_architecture(content: dict[str, Any]) -> None:
    content["architecture"] = "rwkv6"


def drop_a_tensor(content: dict[str, Any]) -> None:
    del content["tensors"]["blk.1.ffn_down.weight"]


def add_a_tensor(content: dict[str, Any]) -> None:
    content["tensors"]["blk.1.ffn_down_exps.weight"] = content["tensors"]["blk.1.ffn_down.weight"]


def reshape_a_tensor(content: dict[str, Any]) -> None:
    content["tensors"]["blk.1.ffn_down.weight"] = content["tensors"]["blk.0.attn_q.weight"]


def use_a_format_that_holds_no_weights(content: dict[str, Any]) -> None:
    blocks = np.zeros((WIDTH, INNER // 32 * 40), np.uint8)
    content["tensors"]["blk.1.ffn_down.weight"] = blocks, gguf.GGMLQuantizationType.Q8_1


def drop_the_width(content: dict[str, Any]) -> None:
    del content["keys"]["embedding_length"]


@pytest.mark.parametrize("line", ["cpu,*", "cpu,0b;disk,*"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_architecture, "rwkv6"),
        (drop_a_tensor, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (add_a_tensor, "ffn_down_exps"),
        (reshape_a_tensor, r"model\.layers\.1\.mlp\.down_proj\.weight.*shape"),
        (
            use_a_format_that_holds_no_weights,
            r"layers.1.mlp.down_proj.weight in .*bad.gguf is .* Q8_1",
        ),
        (drop_the_width, "shape"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_file_that_cannot_be_loaded_says_why_before_anything_runs(
    change: Callable[[dict[str, Any]], None], says: str, line: str, tmp_path: Path
) -> None:
    write(tmp_path / "bad.gguf", CASES["llama"], change)
    with leaving_nothing_open(), pytest.raises(DistorchError, match=says) as caught:
        distorch.load(tmp_path / "bad.gguf", line)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_umt5_is_told_by_its_layers_and_not_by_its_name(tmp_path: Path) -> None:
    write(tmp_path / "encoder.gguf", CASES["UMT5"], lambda content: content.update(name="encoder"))
    model = distorch.load(tmp_path / "encoder.gguf", "cpu,*")
    assert type(model).__name__ == "UMT5EncoderModel"


def test_a_norm_that_is_not_f32_is_refused_for_gemma(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        kind = gguf.GGMLQuantizationType.F16
        content["tensors"]["output_norm.weight"] = (np.ones(WIDTH, np.float16), kind)

    write(tmp_path / "bad.gguf", CASES["gemma3"], change)
    with pytest.raises(FormatError, match="F16, not F32"):
        distorch.load(tmp_path / "bad.gguf", "cpu,*")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.head_count", 0),
        ("attention.head_count", 2**31),
        ("attention.head_count_kv", 0),
        ("attention.head_count_kv", 3),
        ("embedding_length", 0),
        ("embedding_length", 2**31),
        ("feed_forward_length", 2**32 - 1),
        ("rope.dimension_count", 0),
        ("rope.dimension_count", 63),
        ("context_length", 0),
        ("block_count", 0),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", 0.0),
        ("vocab_size", 2**32 - 1),
    ],
)
def test_a_damaged_number_is_our_error_or_a_model(key: str, value: float, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["keys"][key] = value

    write(tmp_path / "bad.gguf", CASES["llama"], change)
    try:
        model = distorch.load(tmp_path / "bad.gguf", "cpu,0b;disk,*")
    except DistorchError as error:
        assert error.exit_code == 2  # noqa: PT017  either is right
    else:
        distorch.handle_of(model).remove()


def test_a_damaged_number_of_layers_does_not_build_them_all(tmp_path: Path) -> None:
    """One flipped bit asks for a million layers: the tensors that are there say otherwise."""

    def change(content: dict[str, Any]) -> None:
        content["keys"]["block_count"] = NUM_LAYERS + 2**20

    write(tmp_path / "bad.gguf", CASES["llama"], change)
    code = f"""
        import distorch
        try:
            distorch.load({str(tmp_path / "bad.gguf")!r}, "cpu,*")
        except distorch.DistorchError as error:
            print("refused:", error)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    assert ended.stdout.startswith("refused:"), ended.stderr[-1000:]


def test_a_bad_line_is_told_and_leaves_no_file_open(folder: Path) -> None:
    path, _ = written("llama", folder)
    for line in ("cpu,2gbb", "cuda:7,*", "cpu,0b;disk:/nowhere/at/all,*"):
        with leaving_nothing_open(), pytest.raises(DistorchError):
            distorch.load(path, line)


def test_a_removed_and_a_forgotten_model_leave_no_file_and_no_thread(folder: Path) -> None:
    path, _ = written("llama", folder)
    ids = torch.tensor([[3, 4]])
    threads = threading.active_count()
    for is_removed in (True, False):
        with leaving_nothing_open():
            model = distorch.load(path, "cpu,0b;disk,*")
            with torch.inference_mode():
                model(ids)
            if is_removed:
                distorch.handle_of(model).remove()
            del model
            gc.collect()
            assert threading.active_count() == threads


def test_loading_reads_each_byte_once_and_leaves_the_file_alone(folder: Path) -> None:
    path, _ = written("gemma3", folder)
    before = path.stat()
    content = path.read_bytes()
    model = distorch.load(path, "cpu,50%;disk,50%")
    with torch.inference_mode():
        model(torch.tensor([[3, 4]]))
    distorch.handle_of(model).remove()
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.read_bytes() == content


def test_the_handle_of_a_plain_transformers_model_is_an_error(folder: Path) -> None:
    with pytest.raises(ModelError, match="not distributed"):
        distorch.handle_of(written("llama", folder)[1])
