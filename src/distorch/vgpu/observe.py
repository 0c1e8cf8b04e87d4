"""What happened, seen afterwards: a trace of streams, and the races that were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distorch.vgpu.library import SpanStruct, call, library
from distorch.vgpu.spec import device_name

__all__ = ["Span", "races", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A piece of work on a stream: seconds on the clock of ``time.perf_counter``.

    A copy between memories is the operation ``"copy"``; others are named as torch names them, like
    ``"aten::mm"``. ``source`` and ``target`` are ``"cpu"`` or ``"vgpu:0"``.

    >>> Span(device="vgpu:0", stream=1, operation="copy", begin=1.0, end=1.5, nbytes=8,
    ...      source="cpu", target="vgpu:0").seconds
    0.5
    """

    device: str
    stream: int
    operation: str
    begin: float
    end: float
    nbytes: int
    source: str
    target: str

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


def races() -> tuple[str, ...]:
    """Return what the race detector has found since the last `reset`; the first thousand."""
    text: bytes = library().vgpu_races()
    return tuple(text.decode().splitlines())


@contextmanager
def trace() -> Iterator[list[Span]]:
    """Record what runs within a block; the list is filled at its end, after all devices are done.

    Spans are in the order of their beginning. Views and what waits are not in it.
    """
    spans: list[Span] = []
    call("synchronize_all")
    library().vgpu_trace(True)  # noqa: FBT003 (ctypes knows no keywords)
    try:
        yield spans
        call("synchronize_all")
    finally:
        library().vgpu_trace(False)  # noqa: FBT003 (ctypes knows no keywords)
        spans += _spans()


def _spans() -> list[Span]:
    count = library().vgpu_trace_size()
    found = (SpanStruct * count)()
    library().vgpu_trace_copy(found, count)
    spans = [
        Span(
            device=device_name(span.device),
            stream=span.stream,
            operation=span.operation.decode(),
            begin=span.begin,
            end=span.end,
            nbytes=span.nbytes,
            source=_memory_name(span.source),
            target=_memory_name(span.target),
        )
        for span in found
    ]
    return sorted(spans, key=lambda span: span.begin)


def _memory_name(index: int) -> str:
    return "cpu" if index < 0 else device_name(index)
