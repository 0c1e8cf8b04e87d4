"""What a step of each family of models is given: tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

__all__ = [
    "Inputs",
    "Step",
    "flux_2_inputs",
    "flux_inputs",
    "hunyuan_video_inputs",
    "ltx_video_inputs",
    "qwen_image_inputs",
    "sd3_inputs",
    "wan_inputs",
    "z_image_inputs",
]

_PATCH: Final = 2  # latents of one token, each way
_WAN_IMAGE_TOKENS: Final = 257  # of the CLIP image encoder, for models that start from an image


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step is given: pixels (width, height), frames, tokens, and how many at once.

    ``latent`` is what one latent stands for: frames after the first, and pixels each way.
    """

    size: tuple[int, int] = (0, 0)
    frames: int = 0
    tokens: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    latent: tuple[int, int] = (4, 8)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        width, height = self.size
        every, pixels = self.latent
        return max(0, self.frames - 1) // every + 1, height // pixels, width // pixels

    def __str__(self) -> str:
        """Describe it for people: what was asked of the model."""
        text = "x".join(str(length) for length in (*self.size, self.frames) if length)
        text = text or f"{self.tokens} tokens"
        return f"{text} batch {self.batch}" if self.batch > 1 else text

    def empty(self, *shape: int) -> Tensor:
        """Return a tensor without memory, ``shape`` for each of the batch."""
        return torch.empty(self.batch, *shape, dtype=self.dtype, device="meta")

    def places(self, count: int, axes: int) -> Tensor:
        """Return the places of so many tokens, the same for each of the batch."""
        return torch.empty(count, axes, dtype=self.dtype, device="meta")


Inputs = Callable[[Any, Step], dict[str, Any]]
"""Makes the keyword arguments of a model's forward from its configuration and a step."""


def _tokens(step: Step) -> tuple[int, int]:
    _, rows, columns = step.latents
    return rows // _PATCH, columns // _PATCH


def flux_inputs(config: Any, step: Step) -> dict[str, Any]:
    """FLUX.1."""
    tokens = prod(_tokens(step))
    inputs: dict[str, Any] = {
        "hidden_states": step.empty(tokens, config.in_channels),
        "encoder_hidden_states": step.empty(step.tokens, config.joint_attention_dim),
        "pooled_projections": step.empty(config.pooled_projection_dim),
        "timestep": step.empty(),
        "img_ids": step.places(tokens, 3),
        "txt_ids": step.places(step.tokens, 3),
    }
    return inputs | ({"guidance": step.empty()} if config.guidance_embeds else {})


def flux_2_inputs(config: Any, step: Step) -> dict[str, Any]:
    """FLUX.2."""
    tokens = prod(_tokens(step))
    inputs: dict[str, Any] = {
        "hidden_states": step.empty(tokens, config.in_channels),
        "encoder_hidden_states": step.empty(step.tokens, config.joint_attention_dim),
        "timestep": step.empty(),
        "img_ids": step.places(tokens, 4),
        "txt_ids": step.places(step.tokens, 4),
    }
    return inputs | ({"guidance": step.empty()} if config.guidance_embeds else {})


def qwen_image_inputs(config: Any, step: Step) -> dict[str, Any]:
    """Qwen-Image."""
    rows, columns = _tokens(step)
    return {
        "hidden_states": step.empty(rows * columns, config.in_channels),
        "encoder_hidden_states": step.empty(step.tokens, config.joint_attention_dim),
        "timestep": step.empty(),
        "img_shapes": [[(1, rows, columns)]] * step.batch,
    }


def z_image_inputs(config: Any, step: Step) -> dict[str, Any]:
    """Z-Image, whose class takes a list of what is one tensor to others."""
    return {
        "x": [*step.empty(config.in_channels, *step.latents)],
        "t": step.empty(),
        "cap_feats": [*step.empty(step.tokens, config.cap_feat_dim)],
    }


def sd3_inputs(config: Any, step: Step) -> dict[str, Any]:
    """Stable Diffusion 3 and 3.5."""
    return {
        "hidden_states": step.empty(config.in_channels, *step.latents[1:]),
        "encoder_hidden_states": step.empty(step.tokens, config.joint_attention_dim),
        "pooled_projections": step.empty(config.pooled_projection_dim),
        "timestep": step.empty(),
    }


def ltx_video_inputs(config: Any, step: Step) -> dict[str, Any]:
    """LTX-Video."""
    frames, rows, columns = step.latents
    return {
        "hidden_states": step.empty(frames * rows * columns, config.in_channels),
        "encoder_hidden_states": step.empty(step.tokens, config.caption_channels),
        "encoder_attention_mask": step.empty(step.tokens),
        "timestep": step.empty(),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


def hunyuan_video_inputs(config: Any, step: Step) -> dict[str, Any]:
    """HunyuanVideo."""
    inputs: dict[str, Any] = {
        "hidden_states": step.empty(config.in_channels, *step.latents),
        "encoder_hidden_states": step.empty(step.tokens, config.text_embed_dim),
        "encoder_attention_mask": step.empty(step.tokens),
        "pooled_projections": step.empty(config.pooled_projection_dim),
        "timestep": step.empty(),
    }
    return inputs | ({"guidance": step.empty()} if config.guidance_embeds else {})


def wan_inputs(config: Any, step: Step) -> dict[str, Any]:
    """Wan 2.1 and 2.2."""
    inputs: dict[str, Any] = {
        "hidden_states": step.empty(config.in_channels, *step.latents),
        "encoder_hidden_states": step.empty(step.tokens, config.text_dim),
        "timestep": step.empty(),
    }
    if config.image_dim:
        inputs["encoder_hidden_states_image"] = step.empty(_WAN_IMAGE_TOKENS, config.image_dim)
    return inputs
