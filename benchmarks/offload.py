"""A transformer of diffusers on disk, cold, under one hard cap of memory: ours, and its peers.

What is measured is a process of its own in a control group: it saves a random model, prepares all
contenders, and only then sets the limit of its group, so that each has the same memory as its turn
comes: what the process cannot do without, and a part of the model's size for weights, what is
computed, and the page cache.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
import torch
from common import (
    CappedRun,
    Figures,
    MemoryGroups,
    Quartiles,
    best_of,
    forget,
    in_turn,
    read_ahead,
    settle,
    torch_threads,
    walk_seconds,
    write_out,
)
from disk import READ_AHEAD_KIB, Contender, accelerate_offload, diffusers_offload
from torch import Tensor, nn

import distorch
from distorch.cli.output import show_table

NUM_ROUNDS = 3
_MALLOC = ("MALLOC_MMAP_THRESHOLD_=1048576", "MALLOC_ARENA_MAX=2")  # what is freed goes back
_PART, _LEAST_BYTES = 2, 64 << 20  # the cap leaves half of the model's bytes, and at the least so
_SHAPES: dict[str, dict[str, int]] = {  # of FLUX's transformer
    "tiny": {"num_attention_heads": 2, "num_layers": 4, "num_single_layers": 8},
    "1 B": {"num_attention_heads": 12, "num_layers": 5, "num_single_layers": 16},
}
_HEAD_DIM, _TEXT_TOKENS, _TEXT_WIDTH, _CHANNELS = 128, 16, 512, 64
_MOST_TOKENS = 1024
_SEED = 0
_LINE = "cpu,0b;disk,*"


class Denoiser(nn.Module):
    """A FLUX transformer that is given a picture's tokens alone; the rest is always the same."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor) -> Tensor:
        """Denoise one picture."""
        width = self.transformer.config.pooled_projection_dim
        found: Tensor = self.transformer(
            hidden_states=x.unsqueeze(0),
            encoder_hidden_states=x.new_ones(1, _TEXT_TOKENS, _TEXT_WIDTH),
            pooled_projections=x.new_ones(1, width),
            timestep=x.new_tensor([0.5]),
            img_ids=x.new_zeros(len(x), 3),
            txt_ids=x.new_zeros(_TEXT_TOKENS, 3),
            guidance=x.new_tensor([3.5]),
            return_dict=False,
        )[0]
        return found


class Ours:
    """The model under ``cpu,0b;disk,*``: it is read from where it lies, past the page cache."""

    def __init__(self, folder: Path) -> None:
        self.transformer = distorch.load(folder, _LINE)
        self._handle = distorch.handle_of(self.transformer)

    def alone(self) -> float:
        """X: seconds per step of reading, and no compute, behind a step that did the same."""
        walk_seconds(self._handle, 1)
        return walk_seconds(self._handle, 2)


def build(scale: str) -> nn.Module:
    """Make a random transformer in FLUX's shape."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(_SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return FluxTransformer2DModel(
            attention_head_dim=_HEAD_DIM,
            joint_attention_dim=_TEXT_WIDTH,
            pooled_projection_dim=_TEXT_WIDTH,
            in_channels=_CHANNELS,
            guidance_embeds=True,
            **_SHAPES[scale],
        ).eval()
    finally:
        torch.set_default_dtype(before)


def _loaded(folder: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return model.eval().requires_grad_(requires_grad=False)


def run(num_rounds: int = NUM_ROUNDS, read_ahead_kib: int = READ_AHEAD_KIB) -> Figures:
    """Measure each scale in a process of its own, print, and return the figures."""
    groups, reason = MemoryGroups.find()
    found: Figures = {}
    for scale in _SHAPES:
        with tempfile.TemporaryDirectory(prefix="distorch-bench-") as root:
            folder = Path(root).resolve()
            command = [*("env", *_MALLOC, sys.executable), __file__]
            command += [scale, str(folder), str(num_rounds)]
            with read_ahead(folder, read_ahead_kib) as setting:
                done = CappedRun.measured(command) if groups is None else groups.inside(command)
        assert done.figures is not None, f"the process of {scale!r} ended with {done.returncode}"
        found[scale] = {"read_ahead": setting, **done.figures}
        _report(scale, found[scale], reason)
    return found


def _measure(scale: str, root: Path, num_rounds: int, limit: Path | None) -> Figures:
    """Prepare, set the limit, and let each contender run in turn."""
    folder = root / "model"
    build(scale).save_pretrained(folder)
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    write_out(files)
    model_bytes = sum(path.stat().st_size for path in files)
    forget(files)
    ours = Ours(folder)
    x, compute_seconds, expected, working_bytes = _workload(
        folder, median(ours.alone() for _ in range(3))
    )
    denoiser = Denoiser(ours.transformer)
    contenders = [
        Contender("ours", denoiser, begin=lambda: denoiser(x))
    ]  # the ring is as after one
    for name, offload in (("accelerate", accelerate_offload), ("diffusers", diffusers_offload)):
        (root / name).mkdir()
        transformer = _loaded(folder)
        contender = offload(transformer, root / name)
        contenders.append(replace(contender, model=Denoiser(transformer)))
    cap_bytes = _cap(limit, working_bytes + max(model_bytes // _PART, _LEAST_BYTES))
    equal = dict.fromkeys((contender.name for contender in contenders), True)
    rounds = []
    for number in range(num_rounds + 1):
        forget(files)
        seconds = {"reading": ours.alone()}
        for contender in in_turn(contenders, number):
            _trim()
            contender.begin()
            seconds[contender.name], outputs = contender.passes(x)
            equal[contender.name] &= all(torch.equal(output, expected) for output in outputs)
            settle()
        rounds.append(seconds)
    return {
        "model_bytes": model_bytes,
        "cap_bytes": cap_bytes,
        "tokens": len(x),
        "compute_seconds": compute_seconds,
        "equal": equal,
        "rounds": rounds[1:],  # what is done once, such as learning the order, is not a step's
    }


def _workload(folder: Path, reading_seconds: float) -> tuple[Tensor, float, Tensor, int]:
    """Choose so many tokens that computing takes about as long as reading.

    Returns them, the seconds of computing, the answer, and the bytes that are computed with.
    """
    resident, tokens = Denoiser(_loaded(folder)), 64
    for _ in range(3):
        x = _input(tokens)
        resident(x)
        seconds = best_of(3, lambda x=x: resident(x))
        tokens = min(_MOST_TOKENS, max(16, round(tokens * reading_seconds / seconds / 16) * 16))
    x = _input(tokens)
    expected = resident(x)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the present
    before = _status("VmHWM")
    seconds = best_of(3, lambda: resident(x))
    return x, seconds, expected, _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def _input(tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(_SEED)
    return torch.randn(tokens, _CHANNELS, generator=random).bfloat16()


def _cap(limit: Path | None, more_bytes: int) -> int | None:
    """Limit the group to what this process has for itself now, and so much more."""
    if limit is None:
        return None
    _trim()
    cap_bytes = int(psutil.Process().memory_full_info().uss) + more_bytes
    limit.write_text(str(cap_bytes))
    return cap_bytes


def _trim() -> None:
    """Give back what an earlier contender has freed, so that the next one finds as much room."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _report(scale: str, found: Figures, reason: str) -> None:
    rounds: Sequence[dict[str, float]] = found["rounds"]
    cap = f"cap {found['cap_bytes'] / 2**20:.0f} MiB" if found["cap_bytes"] else f"no cap: {reason}"
    print(
        f"{scale}: FLUX's shape, {found['model_bytes'] / 2**20:.0f} MiB of bf16, {found['tokens']} "
        f"tokens, {cap}; {found['read_ahead']}\n"
        f"compute C {found['compute_seconds']:.3f} s, reading X "
        f"{Quartiles.of([seconds['reading'] for seconds in rounds]).text(3)} s a step"
    )
    rows = []
    for name, equal in found["equal"].items():
        times = [seconds[name] for seconds in rounds]
        gains = [
            min(seconds["accelerate"], seconds["diffusers"]) / seconds[name] for seconds in rounds
        ]
        limits = [max(found["compute_seconds"], seconds["reading"]) for seconds in rounds]
        rows.append(
            [
                name,
                Quartiles.of(times).text(3),
                Quartiles.of([a / b for a, b in zip(limits, times, strict=True)]).text(),
                Quartiles.of(gains).text(),
                "yes" if equal else "NO",
            ]
        )
    show_table(("contender", "T, s a step", "E", "better peer / T", "equal"), rows)


if __name__ == "__main__":
    scale, folder, num_rounds = sys.argv[1:4]
    limit_file = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    with torch.no_grad(), torch_threads(1):
        print(json.dumps(_measure(scale, Path(folder), int(num_rounds), limit_file)))
