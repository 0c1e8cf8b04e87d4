"""Directories of pipelines that are not what they say: one clear line each, and no code is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import distorch
from distorch.convert import convert
from distorch.errors import ModelError
from distorch.integrations.diffusers.asked import Picture
from distorch.integrations.diffusers.drawing import draw
from distorch.run import readers
from examples import tiny
from tests.integrations.huggingface.make import CASES, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(tiny.pipeline("flux"), tmp_path / "flux")


def _change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _refused(folder: Path, **more: Any) -> str:
    with pytest.raises(ModelError) as caught:
        distorch.load(folder, "cpu,8mb;disk,*", **more)
    assert caught.value.hint
    assert "\n" not in caught.value.problem
    assert len(caught.value.problem) < 600
    return caught.value.problem


@pytest.mark.parametrize("text", ["", "hello", "[1]", '[["a", "b"]]', "3", "null", "[" * 100_000])
def test_an_index_is_a_json_object(text: str, folder: Path) -> None:
    (folder / "model_index.json").write_text(text)
    assert "model_index.json is no index of a pipeline" in _refused(folder)


@pytest.mark.parametrize(
    "name",
    ["NoSuchPipeline", "FluxTransformer2DModel", "DiffusionPipeline", "os.system", None, ["a"]],
)
def test_an_index_names_a_pipeline_of_diffusers(name: object, folder: Path) -> None:
    _change(folder / "model_index.json", _class_name=name)
    assert f"names the class {name!r}, which is no pipeline" in _refused(folder)


@pytest.mark.parametrize("component", ["transformer", "scheduler", "tokenizer"])
@pytest.mark.parametrize(
    "entry",
    [
        ["os", "system"],
        ["evil", "Evil"],
        ["diffusers", "NoSuch"],
        ["diffusers"],
        [1, 2],
        [["x"], "y"],
    ],
)
def test_a_component_is_a_class_of_the_libraries(
    entry: object, component: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / component / "evil.py").write_text("raise SystemExit")  # if it ran
    monkeypatch.syspath_prepend(folder / component)
    _change(folder / "model_index.json", **{component: entry})
    said = _refused(folder)
    assert f"{json.dumps(entry)} for its {component}, which is no class of diffusers" in said


def test_a_components_name_is_no_path(folder: Path) -> None:
    _change(folder / "model_index.json", **{"../../vae": ["diffusers", "AutoencoderKL"]})
    assert "for its ../../vae" in _refused(folder)


def test_what_the_class_needs_and_the_index_lacks_is_named(folder: Path) -> None:
    _change(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "names no unet, which a StableDiffusionPipeline has" in _refused(folder)


@pytest.mark.parametrize("component", ["transformer", "vae", "scheduler", "tokenizer"])
def test_a_missing_folder_is_named(component: str, folder: Path) -> None:
    shutil.rmtree(folder / component)
    assert f"lacks its {component}" in _refused(folder)
    (folder / component).mkdir()
    assert f"lacks its {component}" in _refused(folder)


@pytest.mark.parametrize(
    ("component", "pickle"),
    [("transformer", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")],
)
def test_pickled_weights_are_not_read(component: str, pickle: str, folder: Path) -> None:
    weights = next((folder / component).glob("*.safetensors"))
    weights.rename(folder / component / pickle)
    assert "no file named" in _refused(folder)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "scheduler"])
def test_a_file_for_another_family_is_named(component: str, tmp_path: Path) -> None:
    convert(tiny.pipeline("wan") / "transformer", tmp_path / "wan.gguf", "Q8_0")
    said = _refused(tiny.pipeline("flux"), files={component: tmp_path / "wan.gguf"})
    assert f"the pipeline's {component} is a " in said
    assert "holds a WanTransformer3DModel" in said


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_a_language_model_of_another_family_is_named(component: str, tmp_path: Path) -> None:
    write(tmp_path / "llama.gguf", CASES["llama"])
    said = _refused(tiny.pipeline("flux"), files={component: tmp_path / "llama.gguf"})
    assert f"the pipeline's {component} is a " in said
    assert "holds a LlamaForCausalLM" in said


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("transformer/config.json", {"axes_dims_rope": [2, 4, 4]}),
        ("scheduler/scheduler_config.json", {"base_shift": None, "use_dynamic_shifting": True}),
        ("vae/config.json", {"scaling_factor": "large"}),
        ("vae/config.json", {"shift_factor": None}),
    ],
)
def test_settings_that_only_show_when_it_draws_are_no_fault_of_ours(
    file: str, entries: dict[str, Any], folder: Path
) -> None:
    _change(folder / file, **entries)
    pipe = distorch.load(folder, "cpu,8mb;disk,*")
    with pytest.raises(ModelError, match="this FluxPipeline does not fit the others: ") as caught:
        draw(pipe, Picture(prompt=tiny.PROMPT, size=(32, 32), steps=1), lambda *_: None)
    assert "same model" in caught.value.hint
    distorch.handle_of(pipe).remove()


def test_a_fault_of_ours_and_a_full_memory_stay_what_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = distorch.load(folder, "cpu,8mb;disk,*")
    picture = Picture(prompt=tiny.PROMPT, size=(32, 32), steps=1)

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(readers, "_NUM_READERS", "two")
        with pytest.raises(TypeError, match="as an integer"):
            draw(pipe, picture, lambda *_: None)
    with monkeypatch.context() as patched:
        patched.setattr(type(pipe.vae), "decode", full)
        with pytest.raises(MemoryError):
            draw(pipe, picture, lambda *_: None)
    distorch.handle_of(pipe).remove()


@pytest.mark.parametrize(
    ("component", "key"),
    [
        ("transformer", "num_layers"),
        ("text_encoder", "num_hidden_layers"),
        ("text_encoder_2", "num_layers"),
    ],
)
def test_more_layers_than_tensors_are_not_built(component: str, key: str, folder: Path) -> None:
    _change(folder / component / "config.json", **{key: 2**31})
    assert f"says {key}: {2**31}" in _refused(folder)


@pytest.mark.parametrize("component", ["transformer", "scheduler", "tokenizer", "vae"])
def test_what_a_pipeline_was_saved_without_is_named_before_it_draws(
    component: str, folder: Path
) -> None:
    _change(folder / "model_index.json", **{component: [None, None]})
    pipe = distorch.load(folder, "cpu,8mb;disk,*")
    with pytest.raises(ModelError, match=f"FluxPipeline has no {component}"):
        draw(pipe, Picture(prompt=tiny.PROMPT), print)
    distorch.handle_of(pipe).remove()
