"""A transformer of diffusers on disk, cold, under one hard cap of memory: ours, and its peers.

Each library has a process of its own in a control group of its own. When all are prepared, the
limit of each group is set to what its process has then, and as much for each beside: for what is
computed, and half of the model's bytes for weights and the page cache. They run in turns. Ours runs
twice: with nothing at rest, and with a quarter of the weights at rest within that half. The others
have no use for memory beyond their groups of layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from common import (
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import distorch
from distorch.cli.output import show_table

NUM_ROUNDS = 3
_PART, _LEAST_BYTES = 2, 64 << 20  # the cap leaves half of the model's bytes, and at the least so
SHAPES: dict[str, dict[str, int]] = {  # of FLUX's transformer
    "tiny": {"num_attention_heads": 2, "num_layers": 4, "num_single_layers": 8},
    "1 B": {"num_attention_heads": 12, "num_layers": 5, "num_single_layers": 16},
}
_HEAD_DIM, _TEXT_TOKENS, _TEXT_WIDTH, _CHANNELS = 128, 16, 512, 64
_MOST_TOKENS = 1024
_SEED = 0
_ALONE = "reading"
_NOTHING = "cpu,0b;disk,*"
_OURS = {"ours": _NOTHING, "ours, 25 %": "cpu,25%;disk,75%"}
_PEERS = {"accelerate": accelerate_offload, "diffusers": diffusers_offload}


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
    """The model under a line of ours: it is read from where it lies, past the page cache."""

    def __init__(self, folder: Path) -> None:
        self._line = _NOTHING
        self.model = Denoiser(distorch.load(folder, _NOTHING))
        self._handle = distorch.handle_of(self.model.transformer)

    def rest_by(self, line: str) -> None:
        """Move the weights."""
        if line != self._line:
            self._handle.rebudget(line)
        self._line = line

    def begin(self, line: str, x: Tensor) -> float:
        """Stand where a step has just ended, in the order that steps have; the share it reads."""
        self.rest_by(line)
        self.model(x)
        self.model(x)
        return self._handle.plan.streamed_bytes / self._handle.plan.model_bytes

    def alone(self) -> float:
        """X: seconds per step of reading all, and no compute, behind a step that did the same."""
        self.rest_by(_NOTHING)
        walk_seconds(self._handle, 1)
        return min(walk_seconds(self._handle, 1) for _ in range(3))  # the disk is not always alone


def build(shape: dict[str, int]) -> nn.Module:
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
            **shape,
        ).eval()
    finally:
        torch.set_default_dtype(before)


class Worker:
    """A process that answers a line with a line; it ends with its standard input."""

    def __init__(self, stack: ExitStack, groups: MemoryGroups | None, *what: str) -> None:
        command: Sequence[str] = [sys.executable, __file__, *what]
        self._limit: Path | None = None
        if groups is not None:
            folder = stack.enter_context(groups.group())
            self._limit, command = folder / groups.limit, groups.joining(folder, command)
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        stack.callback(self._end)

    def ask(self, question: Any = None) -> Any:
        """Return the answer; None if the process is gone, killed for want of memory or otherwise.

        What it says first, when it is ready, is an answer too.
        """
        assert self._process.stdin is not None, "it has pipes"
        assert self._process.stdout is not None, "it has pipes"
        try:
            if question is not None:
                print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else None

    def cap(self, more_bytes: int) -> int | None:
        """Limit the group to what the process has for itself now, and so much more."""
        if self._limit is None:
            return None
        cap_bytes = int(psutil.Process(self._process.pid).memory_full_info().uss) + more_bytes
        self._limit.write_text(str(cap_bytes))
        return cap_bytes

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def run(num_rounds: int = NUM_ROUNDS, read_ahead_kib: int = READ_AHEAD_KIB) -> Figures:
    """Measure each scale, print, and return the figures."""
    groups, reason = MemoryGroups.find()
    found: Figures = {}
    for scale, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(prefix="distorch-bench-") as root, ExitStack() as stack:
            folder = Path(root).resolve()
            with read_ahead(folder, read_ahead_kib) as setting:
                figures = _measure(stack, groups, folder, shape, num_rounds)
        found[scale] = {"read_ahead": setting, **figures}
        _report(scale, found[scale], reason)
    return found


def _measure(
    stack: ExitStack,
    groups: MemoryGroups | None,
    root: Path,
    shape: dict[str, int],
    num_rounds: int,
) -> Figures:
    """Prepare, set the limits, and let each contender run in turn."""
    model = Worker(stack, None, "model", str(root), json.dumps(shape)).ask()
    assert model is not None, "the model is made, and computed with in memory"
    workers = {name: Worker(stack, groups, name, str(root)) for name in ("ours", *_PEERS)}
    for name, worker in workers.items():
        assert worker.ask() is not None, f"{name} is prepared"
    more_bytes = model["working_bytes"] + max(model["model_bytes"] // _PART, _LEAST_BYTES)
    caps = {name: worker.cap(more_bytes) for name, worker in workers.items()}
    names, rounds = [*_OURS, *_PEERS], []
    for number in range(num_rounds + 1):
        answers = {_ALONE: workers["ours"].ask(_ALONE)}
        for name in in_turn(names, number):
            answers[name] = workers["ours" if name in _OURS else name].ask(name)
            settle()
        rounds.append(answers)
    return {
        **model,
        "cap_bytes": caps,
        "rounds": rounds[1:],  # what is done once, such as learning the order, is not a step's
    }


def _make_model(root: Path, shape: dict[str, int]) -> Figures:
    """Save a random model, and say how long it reads and computes, of so many tokens.

    They are so many that computing takes about as long as reading. Its answer is saved too.
    """
    folder = root / "model"
    build(shape).save_pretrained(folder)
    files = _cold(folder)
    ours = Ours(folder)
    reading_seconds = min(ours.alone() for _ in range(2))  # a disk may still be writing at first
    resident, tokens = Denoiser(_loaded(folder)), 64
    for _ in range(3):
        x = _input(tokens)
        resident(x)
        seconds = best_of(3, lambda x=x: resident(x))
        tokens = min(_MOST_TOKENS, max(16, round(tokens * reading_seconds / seconds / 16) * 16))
    x = _input(tokens)
    save_file({"x": x, "expected": resident(x).contiguous()}, root / "task.safetensors")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is the present
    before = _status("VmHWM")
    return {
        "tokens": tokens,
        "compute_seconds": best_of(3, lambda: resident(x)),
        "working_bytes": _status("VmHWM") - before,
        "model_bytes": sum(path.stat().st_size for path in files),
    }


def _work(name: str, root: Path) -> None:
    """Prepare a library's model, and answer each line with the seconds of some passes."""
    folder = root / "model"
    task = load_file(root / "task.safetensors")
    x, expected = task["x"].clone(), task["expected"].clone()
    if name in _PEERS:
        (root / name).mkdir()
        transformer = _loaded(folder)
        contender = _PEERS[name](transformer, root / name)
        contender = replace(contender, model=Denoiser(transformer))
    else:
        ours = Ours(folder)
        contender = Contender(name, ours.model)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        _cold(folder)
        way, answer = json.loads(line), {}
        if way == _ALONE:
            answer["seconds"] = ours.alone()
        else:
            if way in _OURS:
                answer["share"] = ours.begin(_OURS[way], x)
            answer["seconds"], outputs = contender.passes(x)
            answer["equal"] = all(torch.equal(output, expected) for output in outputs)
        print(json.dumps(answer), flush=True)


def _cold(folder: Path) -> list[Path]:
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    write_out(files)
    forget(files)
    return files


def _loaded(folder: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return model.eval().requires_grad_(requires_grad=False)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def _input(tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(_SEED)
    return torch.randn(tokens, _CHANNELS, generator=random).bfloat16()


def _report(scale: str, found: Figures, reason: str) -> None:
    rounds: Sequence[dict[str, Any]] = found["rounds"]
    caps = [f"{name} {cap / 2**20:.0f} MiB" for name, cap in found["cap_bytes"].items() if cap]
    print(
        f"{scale}: FLUX's shape, {found['model_bytes'] / 2**20:.0f} MiB of bf16, {found['tokens']} "
        f"tokens; caps: {', '.join(caps) or reason}; {found['read_ahead']}\n"
        f"compute C {found['compute_seconds']:.3f} s, reading X "
        f"{Quartiles.of([answers[_ALONE]['seconds'] for answers in rounds]).text(3)} s a step"
    )
    rows = []
    for name in (*_OURS, *_PEERS):
        if any(answers[name] is None for answers in rounds):
            rows.append([name, "killed: it needs more memory", "", "", ""])
            continue
        times = [answers[name]["seconds"] for answers in rounds]
        gains, shares = [], []
        for answers in rounds:
            share = answers[name].get("share", 1)
            limit = max(found["compute_seconds"], share * answers[_ALONE]["seconds"])
            shares.append(limit / answers[name]["seconds"])
            peers = [answers[peer]["seconds"] for peer in _PEERS if answers[peer]]
            gains.append(min(peers, default=0) / answers[name]["seconds"])
        equal = all(answers[name]["equal"] for answers in rounds)
        rows.append(
            [
                name,
                Quartiles.of(times).text(3),
                Quartiles.of(shares).text(),
                Quartiles.of(gains).text(),
                "yes" if equal else "NO",
            ]
        )
    show_table(("contender", "T, s a step", "E", "better peer / T", "equal"), rows)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    with torch.no_grad(), torch_threads(1):
        if what == "model":
            print(json.dumps(_make_model(folder, json.loads(sys.argv[3]))))
        else:
            _work(what, folder)
