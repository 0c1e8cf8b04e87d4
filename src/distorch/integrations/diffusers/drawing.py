"""Asks a pipeline for a picture in the words of its own class; saves what it makes."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.export_utils import export_to_video
from PIL import Image, UnidentifiedImageError

from distorch.errors import DistorchError, ModelError, StorageError, is_out_of_memory, one_line
from distorch.integrations.diffusers.asked import Picture
from distorch.integrations.diffusers.directory import needed_by
from distorch.integrations.diffusers.preview import Preview

__all__ = ["call_of", "draw", "save"]

OnStep = Callable[[int, int], None]
"""Called after each step, with the steps done and the steps in all."""

_FRAMES_PER_SECOND = 16
_MOST_PIXELS = 99_999  # of a side, as ``--size`` reads it
_OPTIONS = {  # of the command line, by what they are called with
    "prompt": "--prompt",
    "negative_prompt": "--negative-prompt",
    "num_inference_steps": "--steps",
    "num_frames": "--frames",
    "width": "--size",
    "height": "--size",
    "image": "--image",
}


def call_of(pipe: Any, asked: Picture) -> dict[str, Any]:
    """Return what to call a pipeline with.

    Raises:
        ModelError: it does not take what is asked for, or a size that is not a multiple of its own.
        StorageError: there is no such image.
    """
    takes = signature(type(pipe).__call__).parameters
    wanted: dict[str, Any] = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "num_inference_steps": asked.steps,
        "num_frames": asked.frames,
        _guidance(takes): asked.guidance,
    }
    if asked.size is not None:
        wanted["width"], wanted["height"] = _checked(asked.size, pipe)
    if asked.image is not None:
        wanted["image"] = _opened(asked.image)
    elif _needs_image(pipe, takes):
        raise ModelError(f"a {type(pipe).__name__} begins with an image", hint="--image first.png")
    wanted = {name: value for name, value in wanted.items() if value is not None}
    strange = [name for name in wanted if name not in takes]
    if strange:
        raise ModelError(
            f"a {type(pipe).__name__} takes no {strange[0]}",
            hint=f"the same without {_OPTIONS.get(strange[0], '--guidance')}",
        )
    return wanted | {"generator": torch.Generator().manual_seed(asked.seed)}


def draw(
    pipe: Any, asked: Picture, on_step: OnStep, preview: Path | None = None
) -> list[Image.Image]:
    """Return the frames of what a pipeline makes: one, unless it makes videos.

    Where the latents stand is shown in the file ``preview`` meanwhile.

    Raises:
        ModelError: the pipeline refuses what is asked, or its components do not fit each other.
    """
    _check_whole(pipe)
    call = call_of(pipe, asked)
    takes = signature(type(pipe).__call__).parameters
    pipe.set_progress_bar_config(disable=True)
    shown = None if preview is None else Preview(preview, pipe, call, takes)

    def stepped(pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        total = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        on_step(step + 1, total)
        if shown is not None:
            shown.show(pipe, tensors["latents"])
        return tensors

    if "callback_on_step_end" in takes:
        call["callback_on_step_end"] = stepped
    try:
        made = pipe(**call, output_type="pil")
    except DistorchError:
        raise
    except ValueError as error:
        raise ModelError(
            f"{type(pipe).__name__} refuses this: {error}",
            hint='--size 1024x1024 --steps 20, or what "distorch run --help" shows',
        ) from error
    except Exception as error:
        if is_out_of_memory(error) or _is_ours(error):
            raise
        raise ModelError(
            f"a component or setting of this {type(pipe).__name__} does not fit the others: "
            f"{one_line(error)}",
            hint="all folders and files of the same model; DISTORCH_DEBUG=1 shows where it failed",
        ) from error
    return list(made.frames[0]) if "frames" in made else [made.images[0]]


def save(frames: list[Image.Image], path: Path) -> list[Path]:
    """Write a picture, a video (.mp4), or, under another name, a folder of frames.

    Raises:
        ModelError: one picture is no video.
    """
    if path.suffix.lower() == ".mp4":
        if len(frames) == 1:
            raise ModelError("one picture is no video", hint="--output out.png")
        export_to_video(frames, str(path), fps=_FRAMES_PER_SECOND)
        return [path]
    if len(frames) == 1:
        frames[0].save(path)
        return [path]
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:04}.png" for number in range(1, len(frames) + 1)]
    for frame, name in zip(frames, paths, strict=True):
        frame.save(name)
    return paths


def _is_ours(error: BaseException) -> bool:
    """Whether our own code has a part in it, below the pipeline's: then it may be our fault."""
    names = [
        str(frame.f_globals["__name__"]) for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return any(name.startswith("distorch.") for name in names[1:])  # the first is `draw`


def _check_whole(pipe: Any) -> None:
    """Refuse a pipeline that was saved without something, and so takes no prompt or draws nothing.

    Raises:
        ModelError: it is one.
    """
    absent = [name for name in needed_by(type(pipe)) if getattr(pipe, name, None) is None]
    if absent:
        raise ModelError(
            f"this {type(pipe).__name__} has no {absent[0]}: its model_index.json leaves it out",
            hint="the whole directory, as it was published",
        )


def _guidance(takes: Mapping[str, Parameter]) -> str:
    """The name of what weighs the prompt: some models have a scale of their own, unused."""
    own = takes.get("guidance_scale")
    unused = own is None or own.default is None
    return "true_cfg_scale" if unused and "true_cfg_scale" in takes else "guidance_scale"


def _needs_image(pipe: Any, takes: Mapping[str, Parameter]) -> bool:
    image = takes.get("image")
    return image is not None and (image.default is Parameter.empty or "Edit" in type(pipe).__name__)


def _checked(size: tuple[int, int], pipe: Any) -> tuple[int, int]:
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    scale = next((int(getattr(pipe, name)) for name in names if hasattr(pipe, name)), 8)
    multiple = scale if hasattr(pipe, "unet") else 2 * scale  # a token is 2 x 2 latents
    width, height = size
    if width % multiple or height % multiple:
        most = _MOST_PIXELS // multiple
        near = "x".join(str(min(most, max(1, round(side / multiple))) * multiple) for side in size)
        raise ModelError(
            f"--size is {width}x{height}, and this model makes multiples of {multiple}",
            hint=f"--size {near}",
        )
    return size


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise StorageError(
            f"{path} cannot be read as an image: {error}", hint="--image first.png"
        ) from error
