"""What happened while a model ran: bytes, seconds, counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Stats"]


@dataclass(slots=True, kw_only=True)
class Stats:
    """Counters of one distribution, since it began.

    ``transfer_seconds`` is the time in which at least one reader was reading, ``waited_seconds``
    the time compute stood still for it. ``streamed_bytes`` were moved; ``cached_bytes`` were used
    where the system's page cache held them. ``num_unplanned`` reads were in no schedule.

    >>> stats = Stats(step_seconds=4.0, transfer_seconds=3.0, waited_seconds=1.5)
    >>> stats.transfer_hidden, stats.efficiency
    (0.5, 0.75)
    """

    num_steps: int = 0
    step_seconds: float = 0.0
    num_visits: int = 0
    num_unplanned: int = 0
    streamed_bytes: int = 0
    cached_bytes: int = 0
    transfer_seconds: float = 0.0
    waited_seconds: float = 0.0

    def __add__(self, other: Stats) -> Stats:
        """Return the counters of both.

        >>> (Stats(num_steps=1) + Stats(num_steps=2)).num_steps
        3
        """
        more = asdict(other)
        return Stats(**{name: value + more[name] for name, value in asdict(self).items()})

    @property
    def transfer_hidden(self) -> float:
        """The share of the transfer time that compute did not wait for, from 0 to 1."""
        if not self.transfer_seconds:
            return 1.0
        return max(0.0, 1 - self.waited_seconds / self.transfer_seconds)

    @property
    def link_bytes_per_second(self) -> float:
        """Bytes per second while something was being read."""
        return self.streamed_bytes / self.transfer_seconds if self.transfer_seconds else 0.0

    @property
    def efficiency(self) -> float:
        """E: the larger of compute and transfer time, over the time the steps took."""
        if not self.step_seconds:
            return 1.0
        compute_seconds = self.step_seconds - self.waited_seconds
        return min(1.0, max(compute_seconds, self.transfer_seconds) / self.step_seconds)
