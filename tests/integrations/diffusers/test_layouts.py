"""Files in their authors' layout hold the weights of diffusers' classes, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distorch.errors import ModelError
from distorch.formats import TensorInfo
from distorch.integrations.diffusers.configs import CONFIGS
from distorch.integrations.diffusers.layouts import LAYOUTS, bare, layout_of, renamed
from tests.integrations.diffusers.files import FORMS, PREFIX, File, build, read
from tests.integrations.diffusers.originals import TINY, WIDTH, state_of, to_original

FILES = [
    *(File(name, form) for name in TINY for form in FORMS),
    *(File(name, "f32", "authors", PREFIX) for name in TINY),
    *(File(name, "Q8_0", "diffusers") for name in TINY),
    *(File(name, "bf16", "diffusers", PREFIX) for name in TINY),
]


def infos(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    found, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 4 * torch.Size(shape).numel()
        found[name] = TensorInfo(name, "F32", shape, offset, nbytes, Path("model.safetensors"))
        offset += nbytes
    return found


def of(name: str) -> dict[str, TensorInfo]:
    state = to_original(TINY[name].layout, state_of(name))
    return infos({key: tuple(value.shape) for key, value in state.items()})


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_holds_the_weights_of_diffusers_class(file: File, tmp_path: Path) -> None:
    built = build(file.write(tmp_path))
    assert type(built.model) is TINY[file.name].model_class
    found, expected = read(built), file.values()
    buffers = dict(built.model.named_buffers())
    assert found.keys() == expected.keys() - buffers.keys()
    assert found.keys() == dict(built.model.named_parameters()).keys()
    for key, value in found.items():
        assert torch.equal(value.flatten(), expected[key].flatten()), key
    for key in expected.keys() & buffers.keys():
        assert torch.equal(buffers[key], expected[key]), key


@pytest.mark.parametrize("name", TINY)
def test_each_family_is_known_in_both_layouts(name: str) -> None:
    tiny = TINY[name]
    for state in (state_of(name), to_original(tiny.layout, state_of(name))):
        layout = layout_of(state)
        assert layout is not None
        assert layout.class_name == tiny.class_name
    assert layout_of([]) is None
    assert layout_of(["model.embed_tokens.weight"]) is None


@pytest.mark.parametrize("name", TINY)
def test_weights_are_read_where_they_lie(name: str) -> None:
    """No byte of the file is read twice, and none is left out."""
    tensors = of(name)
    layout = layout_of(tensors)
    assert layout is not None
    found = renamed(layout, tensors, {})
    spans = sorted((info.offset, info.nbytes) for info in found.infos.values())
    ends = [offset + nbytes for offset, nbytes in spans]
    assert [offset for offset, _ in spans] == [0, *ends[:-1]]
    assert ends[-1] == sum(info.nbytes for info in tensors.values())
    # only what is swapped has to move after it was read
    assert all("norm" in key for key in found.amend)


@pytest.mark.parametrize(
    ("name", "config", "num_tensors"),
    [
        ("flux.1", {"guidance_embeds": True}, 780),
        ("qwen-image", {}, 1933),
        ("wan-2.1-t2v", {}, 1095),
        ("wan-2.1-i2v", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 1303),
        ("z-image", {}, 453),
    ],
)
def test_whole_models_are_told_from_names_and_shapes(
    name: str, config: dict[str, Any], num_tensors: int
) -> None:
    """As many tensors as the published files have; their shapes are the class's defaults."""
    with torch.device("meta"):
        model = TINY[name].model_class.from_config(config)
    original = to_original(TINY[name].layout, model.state_dict())
    assert len(original) == num_tensors
    tensors = infos({key: tuple(value.shape) for key, value in original.items()})
    layout = layout_of(tensors)
    assert layout is not None
    shapes = {key: info.shape for key, info in renamed(layout, tensors, {}).infos.items()}
    assert shapes == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    told = CONFIGS[layout.class_name](shapes)
    expected = {**model.config, "out_channels": model.config.get("out_channels") or 64}
    assert told == {key: expected[key] for key in told}


def test_one_scale_for_what_the_authors_keep_as_one_tensor(tmp_path: Path) -> None:
    """As ComfyUI writes scaled fp8: the parts of a tensor have its scale."""
    file = File("flux.1", "fp8", prefix=PREFIX)
    tensors = file.tensors()
    matrices = [key for key, value in tensors.items() if value.dim() == 2]
    for key in matrices:
        tensors[f"{key.removesuffix('weight')}scale_weight"] = torch.tensor(0.5)
        tensors[f"{key.removesuffix('weight')}scale_input"] = torch.tensor(3.0)
    tensors[f"{PREFIX}scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    found = read(build(path))
    for key, value in file.values().items():
        assert torch.equal(found[key], value * 0.5 if value.dim() == 2 else value), key


def test_what_the_converter_forgets_is_renamed(tmp_path: Path) -> None:
    """Wan from a first and a last frame has places for both images."""
    places = torch.ones(1, 18, WIDTH)
    tensors = File("wan-2.1-i2v", "f32").tensors() | {"img_emb.emb_pos": places}
    path = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    found = read(build(path))
    assert torch.equal(found["condition_embedder.image_embedder.pos_embed"], places)


def test_other_models_in_the_file_are_left_out() -> None:
    names = {f"{PREFIX}a": (1,), "vae.b": (1,), "text_encoders.t5xxl.c": (1,)}
    assert [*bare(infos(names))] == ["a"]
    assert [*bare(infos({"a": (1,), "b": (1,)}))] == ["a", "b"]


@pytest.mark.parametrize("name", ["flux.1", "hunyuan-video"])
def test_a_width_that_diffusers_cannot_convert_is_an_error(name: str) -> None:
    layout = next(each for each in LAYOUTS if each.class_name == TINY[name].class_name)
    assert layout.width is not None
    tensors = of(name)
    tensors |= infos({layout.width: (1000, 64)})
    with pytest.raises(ModelError, match="of width 3072 only, and this one has 1000"):
        renamed(layout, tensors, {})
    del tensors[layout.width]
    with pytest.raises(ModelError, match=f"lacks {layout.width}"):
        renamed(layout, tensors, {})


def test_what_diffusers_cannot_convert_is_an_error() -> None:
    tensors = of("flux.1")
    del tensors["time_in.in_layer.weight"]
    layout = layout_of(tensors)
    assert layout is not None
    with pytest.raises(ModelError, match=r"cannot convert .*time_in\.in_layer\.weight"):
        renamed(layout, tensors, {})
