"""The main job: a GGUF language model, ready to generate, then generating, on four footings."""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from common import (
    CappedRun,
    Figures,
    MemoryGroups,
    Quartiles,
    forget,
    in_turn,
    read_through,
    seconds_of,
    settle,
    walk_seconds,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import distorch
from distorch.cli.demo import demo_model
from distorch.cli.output import show_pairs, show_table
from distorch.integrations.huggingface import gguf_model
from distorch.integrations.module_tree import as_parameter, describe
from distorch.integrations.resting import Packed

NUM_ROUNDS = 5
_LINE = "cpu,64mb;disk,*"
_NUM_TOKENS = 32
_PROMPT = torch.tensor([[2, 818, 5279, 529, 7001, 563]])  # "The capital of France is"
_WALKS = 4
_LOAD_ROUNDS = 1
_CAPPED_ROUNDS = 3
_CAPPED_TOKENS = 24
_HEADROOM_BYTES = 48 << 20  # above what ours cannot do without: too little to cache the file whole


@dataclass(slots=True)
class Clock:
    """What transformers calls a streamer: it notes when the prompt and each token were there."""

    times: list[float] = field(default_factory=list)

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def seconds_per_token(self) -> float:
        """Of all but the first token, whose step reads the prompt."""
        _prompt, first, *rest = self.times
        return (rest[-1] - first) / len(rest)


def decode(model: PreTrainedModel, num_tokens: int) -> tuple[float, list[int]]:
    """Generate greedily; return the seconds per token and the tokens."""
    clock = Clock()
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=_PROMPT,
            attention_mask=torch.ones_like(_PROMPT),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
        )
    return clock.seconds_per_token, tokens[0].tolist()


def _demo() -> Path:
    """The demo model's file."""
    path = demo_model(lambda _done, _total: None)
    transformers.utils.logging.set_verbosity_error()
    size, threads = path.stat().st_size, torch.get_num_threads()
    print(f"{path.name}, {size / 1e6:.0f} MB, {threads} threads")
    return path


def _load_dense(path: Path) -> PreTrainedModel:
    """Let transformers load the file, which it does into dense float32."""
    with redirect_stderr(io.StringIO()):  # its progress bar
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        )
    return model.eval()


def loading() -> Figures:
    """Seconds until a model can generate; both sides import and read the file once before."""
    path = _demo()
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}

    def by_transformers() -> None:
        _load_dense(path)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)

    def by_us() -> None:
        model = distorch.load(path, _LINE)
        distorch.load_tokenizer(path)
        distorch.handle_of(model).remove()

    with _empty_cache():
        read_through(path)
        distorch.handle_of(distorch.load(path, _LINE)).remove()  # builds the kernels
        first = seconds_of(lambda: distorch.load_tokenizer(path))
        for _ in range(_LOAD_ROUNDS):
            seconds["ours"].append(seconds_of(by_us))
            seconds["transformers"].append(seconds_of(by_transformers))
    ratios = Quartiles.of(
        [o / t for o, t in zip(seconds["ours"], seconds["transformers"], strict=True)]
    )
    show_pairs(
        [
            (
                "ready to generate, transformers",
                f"{Quartiles.of(seconds['transformers']).text()} s",
            ),
            ("ready to generate, ours", f"{Quartiles.of(seconds['ours']).text()} s"),
            ("ours / transformers", ratios.text(3)),
            ("ours, the first time: tokenizer", f"{first:.1f} s"),
        ]
    )
    return {"seconds": seconds, "ratio": ratios.figures, "first_tokenizer": first}


@contextmanager
def _empty_cache() -> Iterator[None]:
    """A user's cache with nothing in it, so that the first time is a first time."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix="distorch-bench-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["XDG_CACHE_HOME"]
            else:
                os.environ["XDG_CACHE_HOME"] = before


class Streaming:
    """Our model under a budget; the file in the page cache, or not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.model = distorch.load(path, _LINE)
        self.handle = distorch.handle_of(self.model)

    def warm(self) -> float:
        """Decode with the file cached."""
        read_through(self._path)
        return self._decode()

    def cold(self) -> float:
        """Decode with the file not cached: forgotten first, and streaming keeps it so."""
        self.begin_cold()
        return self._decode()

    def begin_cold(self) -> None:
        """Start with an empty ring, on a file that is not cached."""
        self.handle.rebudget(_LINE)
        forget([self._path])

    def read_alone(self) -> float:
        """X: seconds that a token's bytes take to arrive, past the cache, without compute."""
        self.begin_cold()
        return walk_seconds(self.handle, _WALKS)

    def _decode(self) -> float:
        seconds, self.tokens = decode(self.model, _NUM_TOKENS)
        return seconds


def decoding() -> Figures:
    """Seconds per token of each footing, in turn."""
    path = _demo()
    dense = _load_dense(path)
    streaming = Streaming(path)
    resident = distorch.load(path, "cpu,*")
    expected = decode(dense, _NUM_TOKENS)[1]
    same = {"dense float32": expected, "resident": decode(resident, _NUM_TOKENS)[1]}
    jobs: list[tuple[str, Callable[[], float]]] = [
        ("dense float32", lambda: decode(dense, _NUM_TOKENS)[0]),
        ("resident", lambda: decode(resident, _NUM_TOKENS)[0]),
        ("streaming, warm", streaming.warm),
        ("streaming, cold", streaming.cold),
    ]
    rounds = []
    for number in range(NUM_ROUNDS):
        seconds = {}
        for name, job in in_turn(jobs, number):
            seconds[name] = job()
            if name.startswith("streaming"):
                same[name] = streaming.tokens
            settle()
        seconds["reading"] = streaming.read_alone()
        rounds.append(seconds)
    streamed_bytes = streaming.handle.plan.streamed_bytes
    for model in (streaming.model, resident):
        distorch.handle_of(model).remove()
    equal = {name: tokens == expected for name, tokens in same.items()}
    return _report_decoding(rounds, equal, streamed_bytes)


def _report_decoding(
    rounds: list[dict[str, float]], equal: dict[str, bool], streamed_bytes: int
) -> Figures:
    def over(name: str, other: str) -> Quartiles:
        return Quartiles.of([seconds[other] / seconds[name] for seconds in rounds])

    speeds = {name: Quartiles.of([1 / seconds[name] for seconds in rounds]) for name in equal}
    rows = [
        [name, speed.text(1), over(name, "dense float32").text(), over(name, "resident").text()]
        for name, speed in speeds.items()
    ]
    titles = ("decoding", "tokens / s", "/ dense", "/ resident", "same")
    show_table(titles, [[*row, "yes" if equal[row[0]] else "NO"] for row in rows])
    cold = "streaming, cold"
    limits = [max(seconds["resident"], seconds["reading"]) for seconds in rounds]
    efficiency = Quartiles.of(
        [limit / seconds[cold] for limit, seconds in zip(limits, rounds, strict=True)]
    )
    reading = Quartiles.of([seconds["reading"] for seconds in rounds])
    compute = Quartiles.of([seconds["resident"] for seconds in rounds])
    speed = streamed_bytes / reading.median / 1e9
    print(
        f"cold: E {efficiency.text()}; compute C {compute.text(1, 1e3)} ms, "
        f"reading X {reading.text(1, 1e3)} ms a token ({speed:.2f} GB/s)"
    )
    return {"rounds": rounds, "same_tokens": equal, "E_cold": efficiency.figures}


def capped() -> Figures:
    """Tokens per second under one hard cap of memory, in a process of its own each."""
    path = _demo()
    groups, reason = MemoryGroups.find()
    if groups is None:
        print(f"skipped, {reason}")
        return {"skipped": reason}

    def one(name: str, cap_bytes: int | None) -> CappedRun:
        forget([path])
        return groups.run([sys.executable, __file__, name, str(path)], cap_bytes)

    free = one("ours", None)
    cap_bytes = free.peak_anonymous_bytes + _HEADROOM_BYTES
    runs: dict[str, list[CappedRun]] = {"ours": [], "mmap": []}
    for number in range(_CAPPED_ROUNDS):
        for name in in_turn(list(runs), number):
            runs[name].append(one(name, cap_bytes))
    return _report_capped(runs, cap_bytes)


def _report_capped(runs: dict[str, list[CappedRun]], cap_bytes: int) -> Figures:
    mib = 1 << 20
    print(f"{cap_bytes / mib:.0f} MiB for the whole process and what it caches, both alike")
    died = {name: [r.returncode for r in rs if r.figures is None] for name, rs in runs.items()}
    if any(died.values()):
        print(f"a process ended early, exit codes {died}")
        return {"cap_bytes": cap_bytes, "exit_codes": died}
    speeds = {name: [1 / r.figures["seconds_per_token"] for r in rs] for name, rs in runs.items()}
    rows = [
        [
            {"ours": f"ours, {_LINE}", "mmap": "plain mmap"}[name],
            Quartiles.of(speeds[name]).text(),
            f"{max(r.peak_bytes for r in rs) / mib:.0f}",
            f"{max(r.peak_anonymous_bytes for r in rs) / mib:.0f}",
        ]
        for name, rs in runs.items()
    ]
    show_table(("capped", "tokens / s", "peak MiB", "of it anonymous"), rows)
    ratio = Quartiles.of([o / m for o, m in zip(speeds["ours"], speeds["mmap"], strict=True)])
    same = len({tuple(r.figures["tokens"]) for rs in runs.values() for r in rs}) == 1
    print(f"ours / mmap {ratio.text()}, same tokens: {'yes' if same else 'NO'}")
    return {"cap_bytes": cap_bytes, "tokens_per_second": speeds, "ratio": ratio.figures}


def from_mmap(path: Path) -> PreTrainedModel:
    """The same model with its packed weights used straight from a map of the file."""
    warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes
    checkpoint = distorch.open_checkpoint(path)
    built = gguf_model.build(checkpoint)
    for name, weight in describe(built.model, built.stored).weights.items():
        info = built.infos[name]
        raw = torch.frombuffer(checkpoint.view(info.name), dtype=torch.uint8)
        if name in built.amend:
            raw = raw.clone()
            built.amend[name](memoryview(raw.numpy()))
        form = Packed(info.dtype, weight.original.dtype)
        tensor = as_parameter(form.weight(raw, weight.original.shape))
        for owner, attribute in weight.users:
            owner._parameters[attribute] = tensor
    return built.model


def _decode_alone(name: str, path: Path) -> None:
    """What a process under the cap does: one contender, and one line of JSON."""
    model = from_mmap(path) if name == "mmap" else distorch.load(path, _LINE)
    found = [decode(model, _CAPPED_TOKENS) for _ in range(2)]
    seconds = statistics.median(seconds for seconds, _ in found)
    print(json.dumps({"seconds_per_token": seconds, "tokens": found[0][1]}))


if __name__ == "__main__":
    _decode_alone(sys.argv[1], Path(sys.argv[2]))
