"""Runs one model with a LoRA that cannot be a function of its layer, then with others, and none.

Weights are placed all the while, as a user changes a LoRA between two runs. It prints nothing and
exits with 0 if all bits are those that ComfyUI's own loader gives.

usage: patches_script.py COMFYUI_DIR MODELS_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TREE, MODELS = sys.argv[1], Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu"]
sys.path[:0] = [TREE, str(Path(__file__).parents[2] / "src")]

import comfy.options  # noqa: E402 (its place was said just above)

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402

from distorch.integrations.comfyui.in_comfy.outputs import placed, spread  # noqa: E402
from distorch.integrations.comfyui.in_comfy.patcher import handle_in  # noqa: E402
from distorch.integrations.request import Request  # noqa: E402

PLACE = spread(Request(allocation="cpu,1mb;disk,*", compute="cpu"))
WIDTH, TEXT, MORE = 256, 4096, 8  # of the tiny Wan; what one LoRA adds to the width of the text
LORAS: dict[str, tuple[str, Any]] = {
    "wider": ("text_embedding.0.weight", (torch.ones(WIDTH, TEXT + MORE), {"pad_weight": True})),
    "no function": ("blocks.0.norm3.weight", (torch.ones(WIDTH),)),
    "skipped": ("blocks.0.modulation", (torch.ones(1, 6, WIDTH),)),
    "ordinary": ("blocks.0.ffn.0.weight", (torch.ones(2 * WIDTH, WIDTH),)),
}
STEPS = (
    ("skipped", 1.0),
    ("wider", 1.0),
    ("wider", 0.5),
    ("ordinary", 1.0),
    ("no function", 1.0),
    ("no function", 0.5),
    (None, 1.0),
    ("no function", 1.0),
    ("wider", 1.0),
)


def load() -> Any:
    """Load the model, one layer of it torch's own, as those of some packs' models are."""
    patcher = comfy.sd.load_diffusion_model(str(MODELS / "diffusion_models/wan.safetensors"))
    block = patcher.model.diffusion_model.blocks[0]
    layer = torch.nn.LayerNorm(WIDTH, dtype=block.norm3.weight.dtype)
    layer.load_state_dict(block.norm3.state_dict())
    block.norm3 = layer.requires_grad_(requires_grad=False)
    return patcher


def with_lora(patcher: Any, name: str | None, strength: float) -> Any:
    if name is None:
        return patcher
    twin = patcher.clone()
    key, patch = LORAS[name]
    values = (patch[0] * 0.01, *patch[1:])
    assert twin.add_patches({f"diffusion_model.{key}": ("diff", values)}, strength)
    return twin


def run(patcher: Any, name: str | None) -> torch.Tensor:
    torch.manual_seed(0)
    text = torch.randn(1, 16, TEXT + (MORE if name == "wider" else 0))
    latent = torch.randn(1, 16, 2, 8, 8)
    comfy.model_management.load_models_gpu([patcher])
    found: torch.Tensor = patcher.model.apply_model(latent, torch.tensor([0.7]), c_crossattn=text)
    return found


def core(name: str | None, strength: float) -> torch.Tensor:
    found = run(with_lora(load(), name, strength), name)
    comfy.model_management.unload_all_models()
    return found


@torch.inference_mode()
def main() -> None:
    expected = {step: core(*step) for step in dict.fromkeys(STEPS)}
    assert not torch.equal(expected["no function", 1.0], expected["no function", 0.5])
    ours = placed("MODEL", load(), PLACE)
    for index, step in enumerate(STEPS):
        patcher = with_lora(ours, *step)
        assert torch.equal(run(patcher, step[0]), expected[step]), (index, step)
        assert handle_in(patcher) is not None, (index, step)
    assert torch.equal(run(once_placed(), None), expected[None, 1.0])


def once_placed() -> Any:
    """Return a model that was placed behind a LoRA, which are both forgotten."""
    patcher = load()
    run(placed("MODEL", with_lora(patcher, "ordinary", 1.0), PLACE), "ordinary")
    return patcher


if __name__ == "__main__":
    main()
