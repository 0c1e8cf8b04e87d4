"""Models from files: diffusers' own classes, its own results, in every form and allocation."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distorch
from distorch.errors import DistorchError, ModelError
from distorch.integrations.diffusers.configs import ZERO_CONDITION_MARKER
from distorch.machine import Machine
from tests.integrations.diffusers.files import FORMS, PREFIX, File, build, write_config
from tests.integrations.diffusers.originals import TINY, resident, run, state_of

ALLOCATIONS = ["cpu,*", "cpu,50%;disk,50%", "cpu,0b;disk,*"]
CONVERTED = ["flux.2", "wan-2.1-t2v", "wan-2.1-i2v", "z-image", "sd3.5", "ltx-video"]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that goes at once: the files of a run are some hundred MB."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def load(path: Path, line: str, dtype: torch.dtype, machine: Machine) -> nn.Module:
    model: nn.Module = distorch.load(path, line, compute_dtype=dtype, machine=machine)
    return model


@cache
def expected(file: File) -> Tensor:
    """What diffusers' class computes, its weights dense and in memory."""
    return run(file.name, resident(file.name, file.values(), file.compute), file.compute)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TINY)
def test_results_are_the_resident_models_in_every_allocation(
    name: str, form: str, folder: Path, machine: Machine
) -> None:
    file = File(name, form, prefix=PREFIX if form == "fp8" else "")
    path = file.write(folder)
    for line in ALLOCATIONS:
        model = load(path, line, file.compute, machine)
        assert type(model) is TINY[name].model_class
        assert torch.equal(run(name, model, file.compute), expected(file)), line
        distorch.handle_of(model).remove()


@pytest.mark.parametrize("name", TINY)
def test_a_directory_of_diffusers_is_the_same_model(
    name: str, folder: Path, machine: Machine
) -> None:
    """Saved by diffusers in shards, loaded by it, and by us: parameters, buffers and settings."""
    oracle = resident(name, state_of(name), torch.bfloat16)
    oracle.save_pretrained(folder, max_shard_size="2MB")  # type: ignore[operator]
    assert len([*folder.glob("*.safetensors")]) > 1
    dtype = torch.bfloat16
    oracle = TINY[name].model_class.from_pretrained(folder, torch_dtype=dtype).eval()
    model = load(folder, "cpu,0b;disk,*", dtype, machine)
    buffers = dict(model.named_buffers())
    for key, value in oracle.named_buffers():
        found = buffers.pop(key)
        assert found.dtype == value.dtype, key
        assert torch.equal(found, value), key
    assert not buffers
    config: Any = model.config
    assert {**config, "_name_or_path": oracle.config._name_or_path} == oracle.config
    assert not model.training
    distorch.handle_of(model).remove()
    parameters = dict(model.named_parameters())
    for key, value in oracle.named_parameters():
        found = parameters.pop(key)
        assert found.dtype == value.dtype, key
        assert torch.equal(found, value), key
    assert not parameters


@pytest.mark.parametrize("name", CONVERTED)
def test_diffusers_reads_a_single_file_as_the_same_model(name: str, folder: Path) -> None:
    prefix = "" if name == "flux.2" else PREFIX  # which diffusers does not take off there
    path = File(name, "f32", prefix=prefix).write(folder, config=True)
    oracle = TINY[name].model_class.from_single_file(path, config=str(folder))
    built = build(path)
    assert {key for key, _ in oracle.named_parameters()} == built.infos.keys()
    values = File(name, "f32").values()
    for key, value in oracle.state_dict().items():
        assert torch.equal(value, values[key]), key
    for key, value in oracle.named_buffers():
        assert torch.equal(value, built.model.get_buffer(key)), key


def test_the_configuration_beside_a_file_wins(folder: Path, machine: Machine) -> None:
    file = File("wan-2.1-t2v", "bf16")
    config: dict[str, Any] = {**TINY[file.name].config, "eps": 0.5, "rope_max_seq_len": 64}
    path = file.write(folder)
    (folder / "config.json").write_text(
        json.dumps({"_class_name": TINY[file.name].class_name, **config})
    )
    model = load(path, "cpu,*", file.compute, machine)
    assert {key: model.config[key] for key in config} == config  # type: ignore[index]
    assert not torch.equal(run(file.name, model, file.compute), expected(file))
    distorch.handle_of(model).remove()


def test_two_experts_are_two_models_of_one_class(folder: Path, machine: Machine) -> None:
    """Wan 2.2: one for much noise and one for little, each a file of its own."""
    files = [File("wan-2.1-t2v", "Q8_0", seed=seed) for seed in (1, 2)]
    found = []
    models = [
        load(file.write(folder / str(file.seed)), "cpu,50%;disk,50%", file.compute, machine)
        for file in files
    ]
    for model, file in zip(models, files, strict=True):
        found.append(run(file.name, model, file.compute))
        assert torch.equal(found[-1], expected(file))
    assert not torch.equal(*found)
    for model in models:
        distorch.handle_of(model).remove()


@pytest.mark.parametrize("form", ["bf16", "fp8 scaled"])
@pytest.mark.parametrize("name", ["flux.1", "sd3.5"])
def test_weights_are_converted_while_they_are_read_in_either_layout(
    name: str, form: str, folder: Path, machine: Machine
) -> None:
    """What was cut out of another tensor, or swapped, is packed as if it had been its own."""
    found = []
    for layout in ("authors", "diffusers"):
        path = File(name, form, layout).write(folder / layout, config=True)
        for line in ("cpu,*", "cpu,50%;disk,50%"):
            model = distorch.load(
                path, line, weight_dtype="q8_0", compute_dtype="f32", machine=machine
            )
            found.append(run(name, model, torch.float32))
            distorch.handle_of(model).remove()
    first, *others = found
    assert all(torch.equal(first, other) for other in others)
    assert not torch.equal(
        first, run(name, resident(name, state_of(name), torch.float32), torch.float32)
    )


def test_only_the_denoiser_of_a_whole_checkpoint_is_loaded(folder: Path, machine: Machine) -> None:
    file = File("sd3.5", "bf16", prefix=PREFIX)
    path = file.write(folder)
    others = {
        "first_stage_model.decoder.conv_in.weight": torch.zeros(8, 8, 3, 3),
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.weight": torch.zeros(8, 8),
    }
    save_file({**load_file(path), **others}, path)
    model = load(path, "cpu,0b;disk,*", file.compute, machine)
    assert torch.equal(run(file.name, model, file.compute), expected(file))
    distorch.handle_of(model).remove()


def test_a_mark_in_the_file_tells_how_qwen_image_edit_works(folder: Path, machine: Machine) -> None:
    file = File("qwen-image", "bf16")
    path = file.write(folder)
    save_file({**load_file(path), ZERO_CONDITION_MARKER: torch.zeros(1)}, path)
    model: Any = load(path, "cpu,*", file.compute, machine)
    assert model.config.zero_cond_t
    distorch.handle_of(model).remove()


def fails(
    path: Path, match: str, machine: Machine, error: type[DistorchError] = ModelError
) -> None:
    with pytest.raises(error) as caught:
        distorch.load(path, "cpu,*", machine=machine)
    problem, hint = str(caught.value).split("\n  try: ")
    assert re.search(match, problem), problem
    assert hint
    assert "\n" not in problem


def test_the_configuration_of_another_family(folder: Path, machine: Machine) -> None:
    path = File("wan-2.1-t2v", "bf16").write(folder)
    write_config(folder, "flux.1")
    fails(path, r"holds a WanTransformer3DModel, .*config\.json .* FluxTransformer2DModel", machine)


def test_the_configuration_of_another_size(folder: Path, machine: Machine) -> None:
    path = File("sd3.5", "bf16").write(folder)
    config = {"_class_name": TINY["sd3.5"].class_name, **TINY["sd3.5"].config}
    (folder / "config.json").write_text(json.dumps(config | {"joint_attention_dim": 128}))
    fails(path, r"context_embedder\.weight has shape \[256, 256\] in .*, \[256, 128\] in", machine)
    (folder / "config.json").write_text(json.dumps(config | {"pos_embed_max_size": 13}))
    fails(path, r"pos_embed\.pos_embed has shape \[1, 144, 256\] in .*, \[1, 169, 256\]", machine)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 4}))
    fails(path, r"lacks transformer_blocks\.\d\..* more: it is not a whole SD3", machine)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": "many"}))
    fails(path, "diffusers cannot build a SD3Transformer2DModel", machine)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 1 << 40}))
    fails(path, r"95 tensors, .* num_layers: 1099511627776", machine)
    (folder / "config.json").write_text("{")
    fails(path, "is no configuration", machine)


@pytest.mark.parametrize("class_name", ["NoSuchTransformer", "FluxPipeline", "__version__"])
def test_a_class_that_is_no_model(class_name: str, folder: Path, machine: Machine) -> None:
    path = File("wan-2.1-t2v", "bf16").write(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name}))
    fails(path, f"config.json names '{class_name}', which is no model of diffusers", machine)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("layout", ["authors", "diffusers"])
def test_a_file_that_lacks_a_tensor(name: str, layout: str, folder: Path, machine: Machine) -> None:
    """Whichever is missing, the error is ours, in one line."""
    tensors = File(name, "bf16", layout).tensors()
    for number, key in enumerate(tensors):
        if number % 7 == 3:
            left = {each: value for each, value in tensors.items() if each != key}
            path = folder / f"{number}.safetensors"
            save_file({each: value.contiguous() for each, value in left.items()}, path)
            fails(path, "lacks|cannot convert|no model that is known|is not a whole", machine)
            path.unlink()


def test_a_file_that_was_cut_off(folder: Path, machine: Machine) -> None:
    for form in ("bf16", "Q8_0"):
        path = File("wan-2.1-t2v", form).write(folder)
        path.write_bytes(path.read_bytes()[:-100])
        fails(path, "ends|cut|truncated|bytes", machine, DistorchError)


def test_a_lora_is_not_a_model(folder: Path, machine: Machine) -> None:
    path = folder / "style.safetensors"
    for key in (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora.down.weight",
    ):
        save_file({key: torch.zeros(4, 256)}, path)
        fails(path, r"style\.safetensors is a LoRA, not a model", machine)


def test_a_gguf_of_another_architecture(folder: Path, machine: Machine) -> None:
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fails(path, "is no model that is known by its tensors", machine)
    with pytest.raises(ModelError, match="no model that is known by its tensors"):
        build(path)
