"""Image and video models from files: on devices they have the bits of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

import distorch
from tests.accelerator.make import MACHINE
from tests.integrations.diffusers.files import FORMS, File
from tests.integrations.diffusers.originals import TINY, resident, run

LINE = "vgpu:0,20%;vgpu:1,40%;cpu,40%"


@pytest.fixture(autouse=True)
def _forgotten(_devices: None) -> Iterator[None]:
    """The class of Qwen-Image keeps rotations that it made, on the device, for good."""
    yield
    for method in vars(QwenEmbedRope).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TINY)
def test_a_model_of_a_file_has_the_bits_of_the_cpu(name: str, form: str, tmp_path: Path) -> None:
    file = File(name, form)
    path = file.write(tmp_path)
    model = distorch.load(path, LINE, compute_dtype=file.compute, machine=MACHINE)
    path.unlink()  # the weights rest on the devices and in memory
    plan = distorch.handle_of(model).plan
    assert {"vgpu:0", "vgpu:1", "cpu"} <= set(plan.bytes_by_tier)
    found = run(name, model, file.compute, "vgpu:0")
    distorch.handle_of(model).discard()
    expected = run(name, resident(name, file.values(), file.compute), file.compute)
    assert torch.equal(found, expected)
