"""The 14B demonstration: its file is the model that it says, and a full disk is told of first."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

import torch

from distorch.formats.dtypes import TensorInfo
from distorch.integrations.diffusers.configs import CONFIGS
from distorch.integrations.diffusers.layouts import layout_of, renamed
from distorch.plan.storage import format_named

_FOLDER = Path(__file__).parents[2] / "benchmarks" / "wan_14b"


def _model_file() -> ModuleType:
    spec = util.spec_from_file_location("wan_14b_model_file", _FOLDER / "model_file.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_is_wans_14b_and_nothing_else() -> None:
    form = format_named("Q4_K")
    infos = {
        name: TensorInfo(name, form.dtype(shape).name, shape, 0, 0, Path("wan.gguf"))
        for name, shape in _model_file().tensors(40)
    }
    layout = layout_of(infos)
    assert layout is not None
    assert layout.class_name == "WanTransformer3DModel"
    found = {name: info.shape for name, info in renamed(layout, infos, {}).infos.items()}
    config = CONFIGS[layout.class_name](found)
    with torch.device("meta"):
        model = import_module("diffusers").WanTransformer3DModel.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert found == expected
    assert sum(weight.numel() for weight in model.parameters()) > 14e9


def test_a_disk_without_room_is_told_of_before_anything_is_written(tmp_path: Path) -> None:
    command = [sys.executable, str(_FOLDER), "--folder", str(tmp_path), "--layers", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing was written" in done.stderr
    assert "--folder" in done.stderr
    assert list(tmp_path.iterdir()) == []
