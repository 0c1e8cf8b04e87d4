"""What the examples share: their arguments, and what they print in the end."""

from __future__ import annotations

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from distorch import Handle, handle_of, vgpu

SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16}

for library in (diffusers, transformers):  # their advice is for real models
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
logging.getLogger("torch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning)


class Asked(argparse.Namespace):
    """The arguments of an example; ``call`` is what keeps a tiny model's run short."""

    model: Path
    allocation: str
    prompt: str
    output: Path
    is_tiny: bool

    @property
    def call(self) -> dict[str, Any]:
        """What to call a pipeline with besides: small pictures of a tiny model."""
        return SMALL if self.is_tiny else {}


def arguments(doc: str | None, tiny: Callable[[], Path], allocation: str, *more: str) -> Asked:
    """Read the command line, with ``more`` options; without ``--model``, a tiny one is made."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a directory; default: a tiny random model")
    parser.add_argument("--allocation", default=allocation)
    parser.add_argument("--prompt", default="a fox in the snow")
    parser.add_argument("--output", type=Path, default=Path("example.png"))
    for name in more:
        parser.add_argument(f"--{name}", type=Path)
    asked = parser.parse_args(namespace=Asked())
    asked.is_tiny = asked.model is None
    if asked.is_tiny:
        asked.model = tiny()
    return asked


class Watch:
    """Watches a run: give it as ``callback_on_step_end``, or call `look`; then `report`."""

    def __init__(self, handle: Any) -> None:
        self.handles: Mapping[str, Handle] = (
            {"model": handle} if isinstance(handle, Handle) else handle
        )
        self.peak_bytes = 0
        self.began = time.perf_counter()

    def __call__(self, _pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> Any:
        """Look after a step of diffusers."""
        self.look()
        return tensors

    def look(self) -> None:
        """Count the weights that are on the device that computes most."""
        devices = [handle.plan.compute for handle in self.handles.values()]
        main = max(devices, key=devices.count)
        held = sum(h.weight_bytes for h in self.handles.values() if h.plan.compute == main)
        self.peak_bytes = max(self.peak_bytes, held)

    def report(self) -> None:
        """Print what rested where, what was saved, and how long it took."""
        self.look()
        seconds = time.perf_counter() - self.began
        for name, handle in self.handles.items():
            plan, stats = handle.plan, handle.stats()
            places = ", ".join(f"{mib(n)} on {tier}" for tier, n in plan.bytes_by_tier.items() if n)
            efficiency = f", E {stats.efficiency:.2f}" if stats.num_visits else ""
            print(f"{name:16}{places}; {stats.num_steps} steps streamed{efficiency}")
        total = sum(handle.plan.model_bytes for handle in self.handles.values())
        saved = max(0, total - self.peak_bytes)
        print(f"{mib(total)} of weights, at most {mib(self.peak_bytes)} on the device at once")
        print(f"saved: {mib(saved)} ({saved / total:.0%}); {seconds:.1f} s")


def run(pipe: Any, asked: Asked, **call: Any) -> Watch:
    """Call a pipeline with what was asked, save what it made, and return who watched it."""
    watch = Watch(handle_of(pipe))
    made = pipe(
        asked.prompt,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=watch,
        **asked.call,
        **call,
    )
    save(made, asked.output)
    return watch


def save(made: Any, path: Path) -> None:
    """Save the picture, or the frames of the video as one picture that moves."""
    if "images" in made:
        made.images[0].save(path)
    else:
        frames = [Image.fromarray((frame * 255).astype("uint8")) for frame in made.frames[0]]
        path = path.with_suffix(".gif")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=62, loop=0)
    print(f"wrote {path}")


def mib(nbytes: int) -> str:
    """Write a number of bytes for people."""
    return f"{nbytes / 2**20:.1f} MiB"


def two_cards() -> tuple[str, str]:
    """Return two cards: real ones, or virtual ones where there are none."""
    if torch.accelerator.is_available() and torch.accelerator.device_count() > 1:
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        return f"{kind.type}:0", f"{kind.type}:1"
    if not vgpu.is_installed():
        vgpu.install(os.environ.get("DISTORCH_VGPU", "2gb,2gb"))  # built once, in half a minute
    return "vgpu:0", "vgpu:1"
