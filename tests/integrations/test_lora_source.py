"""LoRAs as they are given: every dialect of names, and what cannot be added is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distorch.errors import AllocationError, DistorchError, FormatError, ModelError, StorageError
from distorch.integrations.attach import Handle
from tests.integrations.loras import LINES, WIDTH, Net, distributed, first, run
from tests.integrations.make import num_hooks

pytestmark = pytest.mark.usefixtures("many_blocks")

DIALECTS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", "."),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "."),
    "Kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "_"),
    "ComfyUI": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "."),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_of_names_gives_the_same_bits(dialect: str, tmp_path: Path) -> None:
    plain = {name: each for name, each in first().items() if "embedding" not in name}
    down, up, dot = DIALECTS[dialect]
    renamed = {}
    for name, tensor in plain.items():
        target, _, which = name.partition(".lora_")
        form = down if which.startswith("A") else up
        renamed[form.format(target.replace(".", dot))] = tensor
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 8}', encoding="utf-8")
    save_file(renamed, tmp_path / "style.safetensors")
    found = []
    for source in (plain, tmp_path / "style.safetensors"):
        module = Net()
        handle = distributed(module, LINES[1])
        lora = handle.add_lora(source, 0.7, strict=True)
        assert lora.targets == ("conv", "head", "layers.0", "layers.1", "layers.2")
        found.append(run(module))
        handle.remove()
    assert torch.equal(*found)
    assert lora.name == "style"


class TestErrors:
    """What cannot be added is told, and nothing has changed."""

    @pytest.fixture
    def handle(self) -> Any:
        module = nn.ModuleDict(
            {"net": Net(), "attention": nn.MultiheadAttention(8, 2), "stack": nn.LSTM(8, 8)}
        )
        handle = distributed(module, LINES[1])
        before = num_hooks(module)
        yield handle
        assert num_hooks(module) == before
        assert not handle.loras
        handle.remove()

    @staticmethod
    def pair(name: str, inputs: int = WIDTH, outputs: int = WIDTH) -> dict[str, Tensor]:
        down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}

    def test_for_another_model(self, handle: Handle) -> None:
        strange = {k: v for i in range(5) for k, v in self.pair(f"blocks.{i}.attn").items()}
        with pytest.raises(ModelError, match=r"none of the 5 modules .*'blocks.0.attn'.* 2 more"):
            handle.add_lora(strange)

    def test_in_part_for_another_model(self, handle: Handle) -> None:
        mixed = {**self.pair("net.layers.0"), **self.pair("net.layers.9"), "net.x": torch.ones(1)}
        said = r"of the 2 modules .* 1 were found; 2 names .*'net.layers.9', 'net.x'"
        with pytest.raises(ModelError, match=said):
            handle.add_lora(mixed, strict=True)
        with pytest.warns(UserWarning, match=said):
            lora = handle.add_lora(mixed)
        assert lora.targets == ("net.layers.0",)
        lora.remove()

    def test_of_another_shape(self, handle: Handle) -> None:
        said = r"net.layers.0: .*\(2, 128\), .*\(256, 256\)"
        with pytest.raises(ModelError, match=said):
            handle.add_lora(self.pair("net.layers.0", inputs=128))

    def test_on_a_module_that_takes_none(self, handle: Handle) -> None:
        with pytest.raises(ModelError, match=r"stack: .* LSTM"):
            handle.add_lora(self.pair("stack"))

    def test_on_a_module_whose_forward_is_never_called(self, handle: Handle) -> None:
        with pytest.raises(ModelError, match=r"attention.out_proj, whose forward .* never"):
            handle.add_lora(self.pair("attention.out_proj", 8, 8))

    def test_that_does_not_fit(self, handle: Handle) -> None:
        with pytest.raises(AllocationError):
            handle.add_lora(self.pair("net.layers.0"), allocation="cpu,1b")

    @pytest.mark.parametrize("strength", [float("nan"), float("inf"), "much"])
    def test_of_no_strength(self, handle: Handle, strength: Any) -> None:
        with pytest.raises(ModelError, match="not a finite number"):
            handle.add_lora(self.pair("net.layers.0"), strength)
        lora = handle.add_lora(self.pair("net.layers.0"), 0.5)
        with pytest.raises(ModelError, match="not a finite number"):
            lora.strength = strength
        assert lora.strength == 0.5
        lora.remove()

    def test_whose_name_is_taken(self, handle: Handle) -> None:
        lora = handle.add_lora(self.pair("net.layers.0"), name="mine")
        with pytest.raises(ModelError, match="'mine' is there already"):
            handle.add_lora(self.pair("net.layers.1"), name="mine")
        others = [handle.add_lora(self.pair("net.layers.1")) for _ in range(3)]
        assert [each.name for each in others] == ["lora", "lora-2", "lora-3"]
        for each in (lora, *others):
            each.remove()

    def test_with_holes_is_warned_about(self, handle: Handle) -> None:
        tensors = self.pair("net.layers.0")
        tensors["net.layers.0.lora_B.weight"][0, 0] = float("nan")
        with pytest.warns(UserWarning, match=r"1 tensors hold NaN .*'net.layers.0.lora_B.weight'"):
            handle.add_lora(tensors).remove()

    def test_a_peft_file_without_its_configuration_is_warned_about(self, handle: Handle) -> None:
        with pytest.warns(UserWarning, match="alpha is taken as the rank"):
            handle.add_lora(self.pair("base_model.model.net.layers.0")).remove()

    @pytest.mark.parametrize(
        ("tensors", "problem"),
        [
            ({}, "no tensors"),
            ({"weight": torch.ones(2)}, "not a LoRA"),
            ({"a.alpha": torch.ones(2), **pair("a", 2, 2)}, "not one number"),
            ({"a": "text"}, "not a tensor"),
            (pair("net.layers.0") | {"net.layers.0.lora_A.weight": torch.ones(0, 256)}, "rank 0"),
        ],
    )
    def test_that_is_none(self, handle: Handle, tensors: Any, problem: str) -> None:
        with pytest.raises(FormatError, match=problem):
            handle.add_lora(tensors)

    def test_files(self, handle: Handle, tmp_path: Path) -> None:
        with pytest.raises(StorageError):
            handle.add_lora(tmp_path / "missing.safetensors")
        for content in (b"", b"GGUF", b"text"):
            (tmp_path / "x.safetensors").write_bytes(content)
            with pytest.raises(DistorchError, match=r"x\.safetensors"):
                handle.add_lora(tmp_path / "x.safetensors")

    def test_after_the_handle_is_gone(self) -> None:
        handle = distributed(Net(), LINES[1])
        handle.remove()
        with pytest.raises(ModelError, match="was removed"):
            handle.add_lora(first())
