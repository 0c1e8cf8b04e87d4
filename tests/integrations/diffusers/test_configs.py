"""What a file's shapes tell of its model's configuration."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from distorch.integrations.diffusers.configs import CONFIGS, ZERO_CONDITION_MARKER
from distorch.integrations.diffusers.layouts import LAYOUTS
from tests.integrations.diffusers.originals import TINY

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in TINY},
    "flux.1-schnell": ("flux.1", {"guidance_embeds": False}),
    "flux.1-fill": ("flux.1", {"in_channels": 384, "out_channels": 64}),
    "flux.2-klein": ("flux.2", {"guidance_embeds": False, "num_attention_heads": 3}),
    "qwen-image-layered": (
        "qwen-image",
        {"use_additional_t_cond": True, "use_layer3d_rope": True},
    ),
    "wan-2.1-flf2v": ("wan-2.1-i2v", {"pos_embed_seq_len": 18}),
    "wan-2.2-5b": ("wan-2.1-t2v", {"in_channels": 48, "out_channels": 48}),
    "z-image-omni": ("z-image", {"siglip_feat_dim": 64, "n_refiner_layers": 2}),
    "sd3": ("sd3.5", {"dual_attention_layers": (), "qk_norm": None}),
    "sd3.5-medium": ("sd3.5", {"dual_attention_layers": (0,)}),
    "ltx-video-13b": ("ltx-video", {"attention_head_dim": 16, "num_layers": 3}),
    "hunyuan-video-i2v": (
        "hunyuan-video",
        {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    ),
}


def shapes_and_config(name: str) -> tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]:
    base, changes = VARIANTS[name]
    tiny = TINY[base]
    with torch.device("meta"):
        model = tiny.model_class.from_config({**tiny.config, **changes})
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return tiny.class_name, shapes, dict(model.config)


@pytest.mark.parametrize("squeezed", [False, True], ids=["", "as ggml has them"])
@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_tell_the_configuration(name: str, *, squeezed: bool) -> None:
    class_name, shapes, config = shapes_and_config(name)
    if squeezed:
        shapes = {key: shape[1:] if shape[0] == 1 else shape for key, shape in shapes.items()}
    found = CONFIGS[class_name](shapes)
    if class_name in {"FluxTransformer2DModel", "Flux2Transformer2DModel"}:
        config["out_channels"] = config["out_channels"] or config["in_channels"]
    assert found == {key: config[key] for key in found}


@pytest.mark.parametrize("name", TINY)
def test_what_they_do_not_tell_is_the_same_in_every_published_model(name: str) -> None:
    """Whoever adds a size to a tiny model is told here if the shapes do not say it."""
    class_name, shapes, _ = shapes_and_config(name)
    told = CONFIGS[class_name](shapes).keys()
    takes = inspect.signature(TINY[name].model_class.__init__).parameters
    assert set(TINY[name].config) <= told <= takes.keys()


def test_a_mark_tells_how_qwen_image_edit_sees_its_images() -> None:
    class_name, shapes, _ = shapes_and_config("qwen-image")
    assert CONFIGS[class_name](shapes)["zero_cond_t"] is False
    assert CONFIGS[class_name](shapes | {ZERO_CONDITION_MARKER: (1,)})["zero_cond_t"] is True


def test_every_layout_has_a_configuration() -> None:
    assert CONFIGS.keys() == {layout.class_name for layout in LAYOUTS}
