"""What is asked of a pipeline. It imports no torch, so that a mistake is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Picture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture or a video; None leaves a choice to the pipeline's class."""

    prompt: str
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    seed: int = 0
    frames: int | None = None
    guidance: float | None = None
    image: Path | None = None
