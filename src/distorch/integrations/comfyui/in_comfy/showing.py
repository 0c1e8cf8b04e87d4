"""What a plan and a run look like in ComfyUI: tables, a picture, a report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageDraw

from distorch.draw import draw_plan
from distorch.errors import DistorchError, MissingExtraError
from distorch.integrations.comfyui.in_comfy.outputs import loaded_patchers
from distorch.integrations.comfyui.in_comfy.patcher import handle_in
from distorch.integrations.memories import machine_here
from distorch.plan.plan import Plan, gib
from distorch.run.stats import Stats

__all__ = ["line_of", "picture_of", "report_on", "shown_image", "text_of"]

_WIDTH, _ROW, _EDGE = 960, 44, 24
_INK, _PAPER, _EMPTY = "#222222", "#ffffff", "#e8e8e8"
_COLOURS = {"cpu": "#E69F00", "disk": "#8C8C8C"}
_COMPUTE, _CARD = "#0072B2", "#009E73"


def text_of(rows: Iterable[tuple[str, str]]) -> str:
    """Write rows of a name and a value as lines, the values under each other."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def line_of(plan: Plan) -> str:
    """Write what a plan came to as an allocation line that asks for the same amounts."""
    totals = plan.bytes_by_tier
    kept = [f"{plan.compute},{totals.pop(plan.compute)}b"]
    lent = [f"{tier},{nbytes}b" for tier, nbytes in totals.items()]
    if lent:
        lent[-1] = lent[-1].rpartition(",")[0] + ",*"
    return ";".join(kept + lent)


def picture_of(plan: Plan) -> torch.Tensor:
    """Draw a plan as ComfyUI's IMAGE; without matplotlib, as a bar for each device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.png")
        try:
            draw_plan(plan, None, path)
        except MissingExtraError:
            _bars(plan).save(path)
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]


def shown_image(picture: torch.Tensor) -> dict[str, str]:
    """Save an IMAGE among ComfyUI's temporary files, and return what makes its page show it."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"distorch_plan_{uuid4().hex[:12]}.png"
    Image.fromarray((picture[0] * 255).round().to(torch.uint8).numpy()).save(folder / name)
    return {"filename": name, "subfolder": "", "type": "temp"}


def report_on(patcher: object) -> list[tuple[str, str]]:
    """Return what happened to a placed model, and what each memory has free, as rows."""
    handle = handle_in(patcher)
    if handle is None:
        return [
            ("not placed now", "the model has not been used yet, was unloaded, or is not placed"),
            *_memory(),
        ]
    return [*handle.plan.table(), *_stalls(handle.stats()), *_memory(handle.weight_bytes)]


def _stalls(stats: Stats) -> list[tuple[str, str]]:
    """The counters of a run, and what they mean for a step."""
    steps = stats.num_steps
    rows = [("steps", str(steps)), ("streamed so far", gib(stats.streamed_bytes))]
    if steps:
        rows += [
            ("a step took", f"{stats.step_seconds / steps:.3f} s"),
            ("of that, stalled", f"{stats.waited_seconds / steps:.3f} s"),
            ("transfer hidden", f"{stats.transfer_hidden:.0%}"),
            ("link", f"{stats.link_bytes_per_second / 1e9:.2f} GB/s"),
        ]
    if stats.num_unplanned:
        rows.append(("reads not foreseen", str(stats.num_unplanned)))
    return rows


def _memory(weight_bytes: int | None = None) -> list[tuple[str, str]]:
    """What every memory has free, and what ComfyUI holds on each device."""
    rows = [] if weight_bytes is None else [("weights on the device", gib(weight_bytes))]
    try:
        tiers = machine_here().tiers
    except DistorchError as error:
        return [*rows, ("memory", error.problem)]
    rows += [
        (f"{tier.name} free", f"{gib(tier.free_bytes)} of {gib(tier.capacity_bytes)}")
        for tier in tiers
    ]
    for loaded in loaded_patchers():
        name, nbytes = type(loaded.model).__name__, int(loaded.loaded_size())
        rows.append((f"loaded on {loaded.load_device}", f"{name}, {gib(nbytes)}"))
    return rows


def _bars(plan: Plan) -> Image.Image:
    """A picture without matplotlib: for each device, its name, its bytes, and their share."""
    totals = plan.bytes_by_tier
    picture = Image.new("RGB", (_WIDTH, _ROW * (len(totals) + 1) + 2 * _EDGE), _PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((_EDGE, _EDGE), f"{gib(plan.model_bytes)} as {plan.allocation}", fill=_INK)
    left, right = _EDGE + 220, _WIDTH - _EDGE
    for row, (tier, nbytes) in enumerate(totals.items(), start=1):
        top = _EDGE + row * _ROW
        pen.text((_EDGE, top), f"{tier[:16]}: {gib(nbytes)}", fill=_INK)
        pen.rectangle((left, top, right, top + _ROW // 2), fill=_EMPTY)
        end = left + (right - left) * nbytes // max(plan.model_bytes, 1)
        colour = _COLOURS.get(tier.partition(":")[0], _CARD)
        if nbytes:
            fill = _COMPUTE if tier == plan.compute else colour
            pen.rectangle((left, top, end, top + _ROW // 2), fill=fill)
    return picture
