"""What a user asks for, in any of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distorch.allocation import Allocation
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.plan.plan import Plan
from distorch.sizes import read_size

__all__ = ["Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for: a line, or the normal mode's numbers; and a bound on the ring."""

    allocation: str | Allocation | Plan | None = None
    virtual_vram_gb: float | None = None
    donor: str | Sequence[str] | None = None
    compute: str | None = None
    ring: str | int | None = None

    def __post_init__(self) -> None:
        """Refuse what a plan says already."""
        others = (self.virtual_vram_gb, self.donor, self.compute, self.ring)
        if isinstance(self.allocation, Plan) and any(other is not None for other in others):
            raise AllocationError(
                "a plan says all of where the weights rest, and another argument says it too",
                hint="the plan alone, or a line with them",
            )

    def line(self, model_bytes: int, machine: Machine) -> Allocation:
        """Return the allocation that this asks for, on this machine.

        Raises:
            AllocationError: both forms were used, or neither reads.
        """
        if self.virtual_vram_gb is None and self.donor is not None:
            raise AllocationError(
                f"donor={self.donor!r} goes with virtual_vram_gb, which was not given",
                hint=f"virtual_vram_gb=8, donor={self.donor!r}",
            )
        if self.virtual_vram_gb is not None:
            if self.allocation is not None:
                raise AllocationError(
                    "an allocation line and virtual_vram_gb were both given",
                    hint=f"one of them: virtual_vram_gb={self.virtual_vram_gb:g}",
                )
            return Allocation.virtual(
                self.virtual_vram_gb, self.donor, self.compute, model_bytes, machine
            )
        if isinstance(self.allocation, Allocation):
            return self.allocation
        assert not isinstance(self.allocation, Plan), "a plan needs no line"
        return Allocation.parse("auto" if self.allocation is None else self.allocation)

    @property
    def ring_bytes(self) -> int | None:
        """The bound on the ring in bytes, from a number or from text such as ``200mb``."""
        if self.ring is None or isinstance(self.ring, int):
            return self.ring
        try:
            return read_size(self.ring)
        except ValueError as error:
            raise AllocationError(
                f"ring={self.ring!r} is not a size in bytes", hint='ring="200mb"'
            ) from error

    @property
    def is_auto(self) -> bool:
        """Whether it is left to us how much rests where, by what is free."""
        line = "auto" if self.allocation is None else self.allocation
        given = self.virtual_vram_gb is not None or isinstance(line, Plan)
        return not given and str(line).strip().lower() == "auto"

    @property
    def names_its_devices(self) -> bool:
        """Whether the user chose where to compute; ``auto`` and a bare number leave it to us."""
        if self.compute is not None:
            return True
        if isinstance(self.allocation, Plan):
            return True
        return self.allocation is not None and str(self.allocation).strip().lower() != "auto"

    @property
    def folder(self) -> Path | None:
        """The folder of the first ``disk:/folder`` that is named, whose free space counts."""
        donors = self.donor.split(",") if isinstance(self.donor, str) else self.donor or ()
        line = self.allocation
        tiers = line.bytes_by_tier if isinstance(line, Plan) else str(line or "").split(";")
        entries = [entry.partition(",")[0] for entry in tiers]
        for name in (*entries, *donors):
            tier, _, folder = name.strip().partition(":")
            if tier.strip().lower() == "disk" and folder:
                return Path(folder)
        return None
