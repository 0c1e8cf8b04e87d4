"""A small picture of where the latents stand, in a file, while a pipeline denoises.

diffusers hands the latents to a callback and has nothing that shows them. The VAE would have to
take its turn in every step, and the weights of others would make room for it. So three numbers are
made of each latent by principal components: that needs no weights. Shapes are those of the picture;
colours, and which side is dark, say nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from distorch.errors import ModelError
from distorch.files import replacing

__all__ = ["Preview", "finished", "grid", "painted"]

_SECONDS: Final = 1  # from one picture to the next, at least
_LONGEST: Final = 256  # pixels of its longer side, about
_CONTRAST: Final = 56  # of 255, for what differs by one standard deviation

State = tuple[float, Tensor]
"""The noise that is left, and the latents."""


class Preview:
    """Writes the picture after a step, unless it has just done so.

    Raises:
        ModelError: such a pipeline hands out no latents.
    """

    def __init__(
        self,
        path: Path,
        pipe: Any,
        call: Mapping[str, Any],
        takes: Mapping[str, Parameter],
    ) -> None:
        if "latents" not in getattr(pipe, "_callback_tensor_inputs", ()):
            raise ModelError(
                f"a {type(pipe).__name__} does not show its latents while it works",
                hint="the same without --preview",
            )
        self._path = path
        self._aspect, self._frames = _aspect(call, takes), _latent_frames(pipe, call, takes)
        self._last: State | None = None
        self._written = -math.inf

    def show(self, pipe: Any, latents: Tensor) -> None:
        """Write the picture, unless the last one is too new."""
        if time.perf_counter() - self._written < _SECONDS:
            return
        denoiser: Any = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
        channels = getattr(getattr(denoiser, "config", None), "out_channels", None)
        shown = grid(latents, channels, self._aspect, self._frames)
        noise = _noise_left(pipe.scheduler)
        if noise is not None:
            before, self._last = self._last, (noise, shown)
            shown = finished(before, self._last)
        with replacing(self._path) as file:
            painted(shown).save(file, "PNG")
        self._written = time.perf_counter()


def grid(latents: Tensor, channels: int | None, aspect: float, num_frames: int) -> Tensor:
    """Return the middle frame of the first picture, in RAM: rows, columns, channels.

    Latents may be tokens: rows of channels, frame after frame, each frame line after line. Else
    there are so many ``channels`` somewhere, or they come first.
    """
    found = latents.detach()[0]
    if found.ndim == 2:  # noqa: PLR2004  tokens, channels
        frames = num_frames if len(found) % num_frames == 0 else 1
        tokens = found.view(frames, -1, found.shape[-1])[frames // 2]
        found = tokens.view(_num_rows(len(tokens), aspect), -1, tokens.shape[-1])
        return found.to("cpu", torch.float32, copy=True)
    found = found.movedim(found.shape.index(channels) if channels in found.shape else 0, -1)
    if found.ndim == 4:  # noqa: PLR2004  frames before rows
        found = found[len(found) // 2]
    return found.to("cpu", torch.float32, copy=True)


def finished(before: State | None, now: State) -> Tensor:
    """Return the latents at the end of the straight line through these two, where no noise is left.

    That is the line which samplers step along, each time a bit anew. Noise itself shows no picture
    until the last steps.
    """
    noise, latents = now
    if before is None or before[0] == noise:
        return latents
    return latents - (latents - before[1]) * (noise / (noise - before[0]))


def painted(latents: Tensor) -> Image.Image:
    """Return a picture of latents: what differs most is brightness, what comes next is colour."""
    rows, columns, channels = latents.shape
    values = latents.reshape(-1, channels).nan_to_num(0, 0, 0)
    values = values - values.mean(0)
    axes = torch.linalg.eigh(values.T @ values).eigenvectors.flip(1)[:, :3]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the same in each step
    parts = values @ axes
    parts = parts * (_CONTRAST / parts[:, 0].std(correction=0).clamp_min(1e-12)) + 128
    pixels = torch.full((len(parts), 3), 128, dtype=torch.uint8)
    pixels[:, : parts.shape[1]] = parts.clamp(0, 255).to(torch.uint8)
    image = Image.frombytes("YCbCr", (columns, rows), pixels.numpy().tobytes()).convert("RGB")
    scale = max(1, _LONGEST // max(rows, columns))
    return image.resize((columns * scale, rows * scale), Image.Resampling.BICUBIC)


def _noise_left(scheduler: Any) -> float | None:
    """The scheduler's sigma after its step; None for schedulers that have none."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or index is None or index >= len(sigmas):
        return None
    return float(sigmas[index])


def _num_rows(num_tokens: int, aspect: float) -> int:
    """The number of rows that divides the tokens and is nearest to the picture's shape."""
    wanted = math.log(math.sqrt(num_tokens / aspect))
    divisors = [rows for rows in range(1, num_tokens + 1) if num_tokens % rows == 0]
    return min(divisors, key=lambda rows: abs(math.log(rows) - wanted))


def _aspect(call: Mapping[str, Any], takes: Mapping[str, Parameter]) -> float:
    """Width by height: as asked, as the image that it begins with, as the class has it, or 1."""
    if "width" in call:
        return float(call["width"] / call["height"])
    if "image" in call:
        return float(call["image"].width / call["image"].height)
    sides = [takes[name].default for name in ("width", "height") if name in takes]
    return sides[0] / sides[1] if all(isinstance(it, int) for it in sides) and sides else 1.0


def _latent_frames(pipe: Any, call: Mapping[str, Any], takes: Mapping[str, Parameter]) -> int:
    """How many frames the latents of a video have."""
    usual = takes["num_frames"].default if "num_frames" in takes else 1
    frames = call.get("num_frames", usual)
    ratio = getattr(pipe, "vae_temporal_compression_ratio", 1)
    return (frames - 1) // ratio + 1 if isinstance(frames, int) else 1
