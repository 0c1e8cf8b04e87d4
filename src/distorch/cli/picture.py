"""A pipeline's run: a picture or a video in a file, then what each of its models cost."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import distorch
from distorch.cli.loading import Wanted
from distorch.cli.output import Bar, StepBar, printable, show_pairs, show_table
from distorch.errors import MissingExtraError, ModelError, StorageError
from distorch.plan.plan import gib

if TYPE_CHECKING:
    from distorch.integrations.diffusers.asked import Picture
    from distorch.integrations.diffusers.pipelines import PipelineHandle

__all__ = ["is_pipeline", "paint", "read_size"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".mp4"}


def is_pipeline(path: Path) -> bool:
    """Whether a path is a directory of a whole pipeline of diffusers."""
    return (path / "model_index.json").is_file()


def read_size(text: str) -> tuple[int, int]:
    """Read a width and a height.

    >>> read_size("1024x768")
    (1024, 768)

    Raises:
        ModelError: it is none.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise ModelError(f"--size is {text!r}, not a width and a height", hint="--size 1024x1024")
    return int(found[1]), int(found[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReport:
    """What one model of the pipeline did; E is None where nothing streamed."""

    model_bytes: int
    bytes_by_tier: dict[str, int]
    ring_bytes: int
    num_steps: int
    moved_bytes: int
    transfer_hidden: float | None
    E: float | None

    @classmethod
    def of(cls, handle: distorch.Handle) -> ModelReport:
        """Put together what a model's plan and counters say."""
        plan, stats = handle.plan, handle.stats()
        visited = stats.num_visits > 0 and stats.num_steps > 0
        brought: int = getattr(handle, "moved_bytes", 0)  # of models that take turns
        return cls(
            model_bytes=plan.model_bytes,
            bytes_by_tier=plan.bytes_by_tier,
            ring_bytes=plan.ring.nbytes,
            num_steps=stats.num_steps,
            moved_bytes=stats.streamed_bytes + stats.cached_bytes + brought,
            transfer_hidden=stats.transfer_hidden if visited else None,
            E=stats.efficiency if visited else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was made, and how it went."""

    output: list[str]
    prompt: str
    num_steps: int
    seconds_to_ready: float
    seconds: float
    seconds_per_step: float | None
    stalled: float | None
    model_bytes: int
    peak_weight_bytes: dict[str, int]
    models: dict[str, ModelReport]

    def table(self) -> list[tuple[str, str]]:
        """Return the whole, as rows of a name and a value."""
        peak = ", ".join(f"{gib(n)} on {device}" for device, n in self.peak_weight_bytes.items())
        rows = [
            ("saved", _shortened(self.output)),
            ("models", f"{gib(self.model_bytes)} in {len(self.models)}"),
            ("peak weight bytes", peak),
            ("ready after", f"{self.seconds_to_ready:.2f} s"),
            ("picture after", f"{self.seconds:.2f} s more"),
        ]
        if self.seconds_per_step is not None:
            rows.append(("each step", f"{self.seconds_per_step:.3f} s of {self.num_steps}"))
        if self.stalled is not None:
            rows.append(("stalled", f"{self.stalled:.0%} of the steps' time"))
        return rows


@dataclass(slots=True)
class Watch:
    """Follows the steps: how long each took, what of it was waiting, how many bytes were there."""

    handle: PipelineHandle
    peak: dict[str, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def look(self) -> None:
        """Take the time after a step, and count."""
        self.times.append(time.perf_counter())
        self.waited.append(sum(each.stats().waited_seconds for each in self.handle.values()))
        self.count()

    def count(self) -> None:
        """Count the bytes that are there now."""
        for device, nbytes in self.handle.weight_bytes.items():
            self.peak[device] = max(nbytes, self.peak.get(device, 0))

    @property
    def seconds_per_step(self) -> float | None:
        """The mean but for the first, which the text encoders are in too."""
        num_steps = len(self.times) - 1
        return (self.times[-1] - self.times[0]) / num_steps if num_steps > 0 else None

    @property
    def stalled(self) -> float | None:
        """The share of that time in which compute waited for weights."""
        if len(self.times) <= 1:
            return None
        return (self.waited[-1] - self.waited[0]) / (self.times[-1] - self.times[0])


def paint(
    path: Path,
    wanted: Wanted,
    asked: Picture,
    *,
    output: Path | None,
    preview: Path | None,
    as_json: bool,
) -> None:
    """Load a pipeline, make what is asked, save it, and say how it went."""
    _check(asked.image, output, preview)
    began = time.perf_counter()
    with Bar() as bar:
        pipe = wanted.load(path, bar)
        handle: PipelineHandle = distorch.handle_of(pipe)
        wanted.add_loras(handle)
    ready = time.perf_counter()
    if wanted.explain and not as_json:
        for name, each in handle.items():
            show_pairs([("component", name), *each.plan.table()])
            typer.echo()
    watch = Watch(handle)
    saved = _drawn(pipe, asked, watch, output, preview)
    models = {name: ModelReport.of(each) for name, each in handle.items()}
    report = Report(
        output=saved,
        prompt=asked.prompt,
        num_steps=len(watch.times),
        seconds_to_ready=ready - began,
        seconds=time.perf_counter() - ready,
        seconds_per_step=watch.seconds_per_step,
        stalled=watch.stalled,
        model_bytes=sum(each.model_bytes for each in models.values()),
        peak_weight_bytes=watch.peak,
        models=models,
    )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    show_pairs(report.table())
    typer.echo()
    show_table(("model", "bytes", "rests", "steps", "moved", "E"), _rows(models))


def _drawn(
    pipe: Any, asked: Picture, watch: Watch, output: Path | None, preview: Path | None
) -> list[str]:
    """Draw with a bar that follows the steps; return the files."""
    from distorch.integrations.diffusers.drawing import draw, save

    with StepBar() as steps:

        def step(done: int, total: int) -> None:
            watch.look()
            steps.show(done, total, watch.seconds_per_step, watch.stalled)

        frames = draw(pipe, asked, step, preview)
    watch.count()
    return [str(path) for path in save(frames, output or _usual_output(len(frames)))]


def _check(image: Path | None, output: Path | None, preview: Path | None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if image is not None and not image.is_file():
        raise StorageError(f"{image}: no such file", hint="--image first.png")
    if preview is not None and preview.suffix.lower() != ".png":
        raise ModelError(f"--preview {preview} is not a PNG", hint="--preview preview.png")
    if output is not None and output.suffix.lower() not in _SUFFIXES:
        raise ModelError(
            f"--output {output} is neither a picture nor a video that can be written",
            hint="--output out.png, or out.mp4",
        )
    for file in (output, preview):
        if file is not None and not file.parent.is_dir():
            raise StorageError(f"{file.parent}: no such folder", hint=f"mkdir -p {file.parent}")
    if output is not None and output.suffix.lower() == ".mp4" and not _writes_video():
        raise MissingExtraError(
            "a video file needs imageio and imageio-ffmpeg, which are not installed",
            hint='pip install "distorch[video]", or --output frames.png for a folder of pictures',
        )


def _writes_video() -> bool:
    return all(find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))


def _usual_output(num_frames: int) -> Path:
    return Path("out.mp4" if num_frames > 1 and _writes_video() else "out.png")


def _rows(models: dict[str, ModelReport]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            gib(each.model_bytes),
            ", ".join(f"{gib(n)} {tier}" for tier, n in each.bytes_by_tier.items() if n),
            str(each.num_steps or ""),
            gib(each.moved_bytes),
            "" if each.E is None else f"{each.E:.2f}",
        )
        for name, each in models.items()
    ]


def _shortened(paths: list[str]) -> str:
    text = paths[0] if len(paths) == 1 else f"{paths[0]} to {Path(paths[-1]).name}"
    return printable(text)
