"""Profiles of models by name or by configuration directory; nothing is loaded or fetched.

A family says what a model's step is given; classes and default configurations are diffusers' and
transformers' own. Each family is a few lines: see ``FAMILIES``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from distorch.errors import ModelError
from distorch.integrations.empty_models import diffusers_model, language_model
from distorch.integrations.module_tree import describe
from distorch.integrations.resting import TORCH_DTYPES
from distorch.integrations.steps import (
    Inputs,
    Step,
    flux_2_inputs,
    flux_inputs,
    hunyuan_video_inputs,
    ltx_video_inputs,
    qwen_image_inputs,
    sd3_inputs,
    wan_inputs,
    z_image_inputs,
)
from distorch.plan.cost import Profile
from distorch.plan.profile import profile_module
from distorch.plan.storage import format_named

__all__ = ["FAMILIES", "Family", "profile_family"]

_DIGITS: Final = 6  # of a side in pixels
_PROMPT_TOKENS: Final = 512  # a language model's step, unless asked otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A diffusers class, what its configuration changes, and its usual step.

    ``tokens`` are those of the text; ``frames`` is 0 for models that make single images.
    ``latent`` is what one latent stands for: frames after the first, and pixels each way;
    ``patch`` how many of them each way are one token.
    """

    class_name: str
    inputs: Inputs
    config: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int]
    frames: int = 0
    tokens: int
    latent: tuple[int, int] = (4, 8)
    patch: int = 2


FAMILIES: Final[Mapping[str, Family]] = {
    "flux.1-dev": Family(
        class_name="FluxTransformer2DModel",
        config={"guidance_embeds": True},
        inputs=flux_inputs,
        size=(1024, 1024),
        tokens=512,
    ),
    "flux.2-dev": Family(
        class_name="Flux2Transformer2DModel",
        inputs=flux_2_inputs,
        size=(1024, 1024),
        tokens=512,
    ),
    "qwen-image": Family(
        class_name="QwenImageTransformer2DModel",
        inputs=qwen_image_inputs,
        size=(1328, 1328),
        tokens=128,
    ),
    "z-image": Family(
        class_name="ZImageTransformer2DModel",
        inputs=z_image_inputs,
        size=(1024, 1024),
        tokens=128,
    ),
    "sd3.5-large": Family(
        class_name="SD3Transformer2DModel",
        config={
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        inputs=sd3_inputs,
        size=(1024, 1024),
        tokens=333,
    ),
    "sd3.5-medium": Family(
        class_name="SD3Transformer2DModel",
        config={
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        inputs=sd3_inputs,
        size=(1024, 1024),
        tokens=333,
    ),
    "wan-14b": Family(  # Wan 2.1: text to video
        class_name="WanTransformer3DModel",
        inputs=wan_inputs,
        size=(832, 480),
        frames=81,
        tokens=512,
    ),
    "wan-2.2-14b": Family(  # one of its two experts, of which a step runs one
        class_name="WanTransformer3DModel",
        inputs=wan_inputs,
        size=(1280, 720),
        frames=81,
        tokens=512,
    ),
    "hunyuan-video": Family(
        class_name="HunyuanVideoTransformer3DModel",
        inputs=hunyuan_video_inputs,
        size=(1280, 720),
        frames=129,
        tokens=256,
    ),
    "ltx-video": Family(
        class_name="LTXVideoTransformer3DModel",
        inputs=ltx_video_inputs,
        size=(704, 480),
        frames=161,
        tokens=128,
        latent=(8, 32),
        patch=1,
    ),
}
"""The models known by name."""


def profile_family(
    name: str,
    *,
    size: str | None = None,
    frames: int | None = None,
    tokens: int | None = None,
    batch: int = 1,
    format: str = "bf16",  # noqa: A002  what users call it
) -> Profile:
    """Return the profile of one step of a model, by name or by configuration directory.

    ``name`` is one of ``FAMILIES``, or a directory whose ``config.json`` is diffusers' (of a class
    in ``FAMILIES``) or transformers' (of a model that takes token ids). Nothing else is read and
    nothing fetched.

    ``size`` is width x height in pixels, such as ``"1328x1328"``; ``frames`` those of a video;
    ``tokens`` those of the text that goes with an image, or those of a language model's step: a
    prompt, or 1 for a step of generation (whose attention to earlier tokens is not counted).
    ``batch`` is how many of each at once; classifier-free guidance in one pass is 2. ``format`` is
    how the weights are stored (`distorch.plan.storage.FORMATS`); packed ones compute in bf16.

    Raises:
        ModelError: the name, format or size is not one that is known; the model takes no such
            option; the configuration makes no model.
        MissingExtraError: diffusers or transformers is not installed.

    >>> profile = profile_family("flux.1-dev", size="512x512", format="Q4_K")
    >>> profile.name, f"{profile.total_flops / 1e12:.1f}", f"{profile.model_bytes / 1e9:.1f}"
    ('flux.1-dev 512x512 Q4_K', '21.5', '6.7')
    """
    form = format_named(format)
    for option, value in (("frames", frames), ("tokens", tokens), ("batch", batch)):
        if value is not None and value < 1:
            raise ModelError(f"{option} is {value}", hint=f"{option} of 1 or more")
    family, config = _find(name)
    step = _step(name, family, size, frames)
    step = replace(
        step, tokens=tokens or step.tokens, batch=batch, dtype=TORCH_DTYPES[form.compute]
    )
    if family is None:
        module = language_model(Path(name), step.dtype)
        inputs = _language_inputs(module, step)
    else:
        module = diffusers_model(family.class_name, config, step.dtype)
        inputs = family.inputs(module.config, step)
    return profile_module(
        module,
        describe(module).root,
        (),
        inputs,
        name=f"{Path(name).resolve().name} {step} {form.name}",
        format=form.name,
    )


def _find(name: str) -> tuple[Family | None, Mapping[str, Any]]:
    """Return the family and configuration that a name or directory stands for; none: transformers'.

    A directory of a whole diffusers pipeline stands for its transformer.
    """
    if found := FAMILIES.get(name.lower()):
        return found, found.config
    path = Path(name)
    path = next((p for p in (path, path / "transformer") if (p / "config.json").is_file()), path)
    try:
        config = json.loads((path / "config.json").read_bytes())
        class_name = config.get("_class_name")
    except OSError as error:
        raise _unknown(name) from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path / 'config.json'} is no configuration: {error}",
            hint="the file may be damaged; download it again",
        ) from error
    if class_name is None:
        return None, config
    for family in FAMILIES.values():
        if family.class_name == class_name:
            return family, config
    known = ", ".join(dict.fromkeys(family.class_name for family in FAMILIES.values()))
    raise ModelError(
        f"{path} is a {class_name}, whose inputs are not known here",
        hint=f"one of {known}; for any other module "
        "distorch.plan.profile.profile_module(module, ...)",
    )


def _unknown(name: str) -> ModelError:
    known = ", ".join(FAMILIES)
    close = get_close_matches(name.lower(), FAMILIES, n=1, cutoff=0)
    return ModelError(
        f"no model is called {name!r}, and it is no directory with a config.json; known: {known}",
        hint=close[0],
    )


def _step(name: str, family: Family | None, size: str | None, frames: int | None) -> Step:
    """A family's usual step, with the size and frames that are asked for."""
    if family is None:
        if size is None and frames is None:
            return Step(tokens=_PROMPT_TOKENS)
        raise ModelError(
            f"{name} is a language model: it has neither size nor frames",
            hint="tokens: the length of a prompt, or 1 for a step of generation",
        )
    every, pixels = family.latent
    if frames is not None and not family.frames:
        raise ModelError(f"{name} makes single images", hint="leave out the frames")
    if frames is not None and frames % every != 1:
        near = max(1, round((frames - 1) / every) * every + 1)
        some = ", ".join(str(count) for count in range(1, 4 * every, every))
        raise ModelError(f"{frames} frames: {name} makes {some}, ... frames", hint=f"{near}")
    return Step(
        size=_size(size, pixels * family.patch) if size else family.size,
        frames=frames or family.frames,
        tokens=family.tokens,
        latent=family.latent,
    )


def _size(text: str, multiple: int) -> tuple[int, int]:
    """Read width x height; both are whole tokens.

    >>> _size("832x480", 16)
    (832, 480)
    """
    sides = text.lower().replace("\N{MULTIPLICATION SIGN}", "x").split("x")
    if len(sides) != 2 or not all(s.isdecimal() and len(s) <= _DIGITS for s in sides):  # noqa: PLR2004
        raise ModelError(f"{text[:40]!r} is no size", hint="width x height in pixels: 1024x1024")
    width, height = map(int, sides)
    near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
    if near != [width, height]:
        raise ModelError(
            f"{text} cannot be cut into tokens of {multiple} x {multiple} pixels",
            hint="x".join(map(str, near)),
        )
    return width, height


def _language_inputs(module: nn.Module, step: Step) -> dict[str, Any]:
    """Token ids, and as in transformers' ``generate`` only the last one's logits are wanted."""
    ids = torch.empty(step.batch, step.tokens, dtype=torch.long, device="meta")
    takes = signature(module.forward).parameters
    return {"input_ids": ids} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})
