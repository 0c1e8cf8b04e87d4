"""Tiny models of diffusers, their weights as they are and as their authors lay them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.diffusers.published import (
    FLUX,
    FLUX_2,
    HUNYUAN_VIDEO,
    LTX,
    SD3,
    WAN,
    Z_IMAGE,
)

diffusers: Any = pytest.importorskip("diffusers", reason="builds diffusers' models")

State = dict[str, Tensor]
EXACT = {"timestep", "t", "img_ids", "txt_ids", "guidance", "encoder_attention_mask"}
WIDTH = 256  # a row of it is whole blocks of every packed format


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A small model: its configuration, what its forward takes, its authors' layout."""

    class_name: str
    config: Mapping[str, Any]
    inputs: Callable[[], dict[str, Any]]
    layout: Mapping[str, str] = field(default_factory=dict)
    gguf_name: str

    @property
    def model_class(self) -> Any:
        return getattr(diffusers, self.class_name)


def _wan_inputs(channels: int = 16) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, channels, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": randn(1, 8, WIDTH),
    }


def _flux_inputs(channels: int, axes: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 16, channels),
        "encoder_hidden_states": randn(1, 8, WIDTH),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(16.0 * axes).view(16, axes),
        "txt_ids": torch.zeros(8, axes),
        "guidance": torch.tensor([3.5]),
    }


_TWO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 128}
_FLUX: dict[str, Any] = {
    **_TWO_HEADS,
    "num_layers": 1,
    "num_single_layers": 2,
    "joint_attention_dim": WIDTH,
}
_WAN: dict[str, Any] = {
    **_TWO_HEADS,
    "text_dim": WIDTH,
    "ffn_dim": 512,
    "num_layers": 2,
}

TINY: dict[str, Tiny] = {
    "flux.1": Tiny(
        class_name="FluxTransformer2DModel",
        config={**_FLUX, "pooled_projection_dim": 64, "guidance_embeds": True},
        inputs=lambda: {**_flux_inputs(64, 3), "pooled_projections": randn(1, 64)},
        layout=FLUX,
        gguf_name="flux",
    ),
    "flux.2": Tiny(
        class_name="Flux2Transformer2DModel",
        config=_FLUX,
        inputs=lambda: _flux_inputs(128, 4),
        layout=FLUX_2,
        gguf_name="flux2",
    ),
    "qwen-image": Tiny(
        class_name="QwenImageTransformer2DModel",
        config={**_TWO_HEADS, "num_layers": 2, "joint_attention_dim": WIDTH},
        inputs=lambda: {
            "hidden_states": randn(1, 16, 64),
            "encoder_hidden_states": randn(1, 8, WIDTH),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 4, 4)]],
        },
        gguf_name="qwen_image",
    ),
    "wan-2.1-t2v": Tiny(
        class_name="WanTransformer3DModel",
        config=_WAN,
        inputs=_wan_inputs,
        layout=WAN,
        gguf_name="wan",
    ),
    "wan-2.1-i2v": Tiny(
        class_name="WanTransformer3DModel",
        config={**_WAN, "in_channels": 36, "image_dim": WIDTH, "added_kv_proj_dim": WIDTH},
        # the class takes all but the last 512 tokens for the image
        inputs=lambda: {
            **_wan_inputs(36),
            "encoder_hidden_states": randn(1, 512, WIDTH),
            "encoder_hidden_states_image": randn(1, 9, WIDTH),
        },
        layout=WAN,
        gguf_name="wan",
    ),
    "z-image": Tiny(
        class_name="ZImageTransformer2DModel",
        config={
            "dim": WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": WIDTH,
        },
        inputs=lambda: {
            "x": [randn(16, 1, 8, 8)],
            "t": torch.tensor([0.5]),
            "cap_feats": [randn(8, WIDTH)],
        },
        layout=Z_IMAGE,
        gguf_name="lumina2",
    ),
    "sd3.5": Tiny(
        class_name="SD3Transformer2DModel",
        config={
            "num_layers": 3,
            "num_attention_heads": 4,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": WIDTH,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 12,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        inputs=lambda: {
            "hidden_states": randn(1, 16, 8, 8),
            "encoder_hidden_states": randn(1, 8, WIDTH),
            "pooled_projections": randn(1, 64),
            "timestep": torch.tensor([500.0]),
        },
        layout=SD3,
        gguf_name="sd3",
    ),
    "ltx-video": Tiny(
        class_name="LTXVideoTransformer3DModel",
        config={
            "num_attention_heads": 32,
            "attention_head_dim": 8,
            "cross_attention_dim": WIDTH,
            "caption_channels": WIDTH,
            "num_layers": 2,
        },
        inputs=lambda: {
            "hidden_states": randn(1, 32, 128),
            "encoder_hidden_states": randn(1, 8, WIDTH),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": torch.ones(1, 8),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        layout=LTX,
        gguf_name="ltxv",
    ),
    "hunyuan-video": Tiny(
        class_name="HunyuanVideoTransformer3DModel",
        config={
            **_TWO_HEADS,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": 64,
        },
        inputs=lambda: {
            "hidden_states": randn(1, 16, 1, 8, 8),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": randn(1, 8, WIDTH),
            "encoder_attention_mask": torch.ones(1, 8),
            "pooled_projections": randn(1, 64),
            "guidance": torch.tensor([6000.0]),
        },
        layout=HUNYUAN_VIDEO,
        gguf_name="hyvid",
    ),
}


@cache
def state_of(name: str, seed: int = 0) -> State:
    """Random weights of a tiny model, by diffusers' names; buffers that are saved among them."""
    tiny = TINY[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = tiny.model_class.from_config(dict(tiny.config)).state_dict()
    return {
        key: torch.randn(value.shape, generator=generator) / 16 + (value.dim() == 1)
        for key, value in shapes.items()
    }


def to_original(layout: Mapping[str, str], state: State) -> State:
    """The same rows, as the authors lay them out; what has no line of its own stays."""
    left, found = dict(state), State()
    for theirs, place in layout.items():
        parts = place.removeprefix("~").split(" + ")
        pattern = re.compile(
            re.escape(parts[0]).replace(r"\#", r"(\d+)")
            + r"(?P<leaf>\.weight|\.weight_scale|\.bias|)"
        )
        for match in filter(None, map(pattern.fullmatch, list(left))):
            number, leaf = match[1], match["leaf"]
            tensor = torch.cat([left.pop(part.replace("#", number) + leaf) for part in parts])
            if place.startswith("~"):
                tensor = torch.cat(tensor.chunk(2)[::-1])
            found[theirs.replace("#", number) + leaf] = tensor
    return found | left


def resident(name: str, state: State, dtype: torch.dtype) -> nn.Module:
    """Diffusers' own class with these weights, dense and in memory."""
    tiny = TINY[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: nn.Module = tiny.model_class.from_config(dict(tiny.config)).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(tiny.model_class._keep_in_fp32_modules or ())
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if key in state:
            wanted = torch.float32 if kept.intersection(key.split(".")) else dtype
            value.data = state[key].to(wanted)
    return model


def run(name: str, model: nn.Module, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """What the model makes of its inputs; positions and the sampler's steps stay exact."""

    def moved(key: str, value: Any) -> Any:
        if isinstance(value, list) and isinstance(value[0], Tensor):
            return [moved(key, each) for each in value]
        if isinstance(value, Tensor):
            return value.to(device, value.dtype if key in EXACT else dtype)
        return value

    with torch.inference_mode():
        inputs = {key: moved(key, value) for key, value in TINY[name].inputs().items()}
        found = model(**inputs, return_dict=False)[0]
    found = found[0] if isinstance(found, list) else found
    assert isinstance(found, Tensor)
    assert found.isfinite().all()
    return found.cpu()
