"""What a node's inputs come to on a machine, as the browser draws it while they are typed.

Everything here is plain data in and plain data out: the routes carry it, and the browser draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from distorch.allocation import Allocation
from distorch.errors import AllocationError, DistorchError, MachineError
from distorch.integrations.comfyui.kits import DEVICE_INPUTS, Kit, request_of
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.sizes import MAX_BYTES

__all__ = [
    "MAX_CHARACTERS",
    "Question",
    "error_of",
    "kind_of",
    "links_of",
    "memories_of",
    "preview",
]

MAX_CHARACTERS = 4096
_MAX_GB = 2**20

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The inputs of a node that say where its model rests; what is not known is empty or None.

    ``text`` is an allocation line and speaks for itself; without one, ``virtual_vram_gb`` GiB rest
    on ``donor_device``, or on all others where ``use_other_vram`` is known. ``model_bytes`` may be
    the size of the model's file.

    >>> Question.read({"text": "cpu,*", "model_bytes": 8}).model_bytes
    8
    """

    text: str = ""
    compute_device: str = ""
    donor_device: str = ""
    virtual_vram_gb: float | None = None
    use_other_vram: bool | None = None
    model_bytes: int | None = None

    @classmethod
    def read(cls, data: object) -> Question:
        """Check what a browser sent.

        Raises:
            DistorchError: it is not such a question.
        """
        if not isinstance(data, Mapping):
            raise DistorchError("the question is not a JSON object", hint='{"text": "cpu,*"}')
        return cls(
            text=_text(data, "text"),
            compute_device=_text(data, "compute_device"),
            donor_device=_text(data, "donor_device"),
            virtual_vram_gb=_number(data, "virtual_vram_gb", _MAX_GB),
            use_other_vram=_flag(data, "use_other_vram"),
            model_bytes=_whole(_number(data, "model_bytes", MAX_BYTES)),
        )

    def request(self, machine: Machine) -> Request:
        """Return what the node would ask for on this machine, in any of its forms.

        Raises:
            MachineError: a device that is chosen is not on this machine.
            AllocationError: an expert line of the old form does not read.
        """
        if self.virtual_vram_gb is None:
            return Request(
                allocation=self.text.strip() or "auto", compute=self.compute_device or None
            )
        kit: Kit = "distorch2" if self.use_other_vram is None else "distorch"
        values = {
            DEVICE_INPUTS[kit][0]: self.compute_device or None,
            "donor_device": self.donor_device or None,
            "virtual_vram_gb": self.virtual_vram_gb,
            "use_other_vram": self.use_other_vram,
            "expert_mode_allocations": self.text,
        }
        return request_of(kit, values, [tier.name for tier in machine.tiers if not tier.is_disk])


def preview(question: Question, machine: Machine) -> Json:
    """Return the line in its canonical form, each device's part of the model, and what is wrong.

    A part of which the size is not known has ``bytes`` None; a ``share`` is of the model, 0 to 1.
    A line that reads and does not fit has its entries as well, as it asks for them.

    >>> from distorch.machine import Tier
    >>> cpu = Tier(name="cpu", capacity_bytes=16, free_bytes=8)
    >>> disk = Tier(name="disk", capacity_bytes=64, free_bytes=32)
    >>> machine = Machine(name="laptop", tiers=(cpu, disk))
    >>> answer = preview(Question(text="cpu,4b; disk,*", model_bytes=16), machine)
    >>> answer["canonical"], [entry["bytes"] for entry in answer["entries"]]
    ('cpu,4b;disk,*', [4, 12])
    >>> preview(Question(text="cpu,4x"), machine)["error"]["position"]
    5
    """
    error, canonical, size = None, "", question.model_bytes
    entries: list[Json] = []
    try:
        request = question.request(machine)
        line = request.line(MAX_BYTES if size is None else size, machine)
        canonical = str(line)
        parts = _asked(line, request, size, machine) if size else _unsized(line, machine)
        shares = _shares(line) if size is None else {}
        entries = [_entry(name, part, shares.get(name), size, machine) for name, part in parts]
        line.resolve(size or 0, machine, request.compute)
    except DistorchError as caught:
        error = error_of(caught)
    return {
        "canonical": canonical,
        "model_bytes": size,
        "entries": entries,
        "error": error,
    }


def error_of(error: DistorchError) -> Json:
    """Return an error as data; ``position`` is None where no place of a line is meant.

    >>> error_of(DistorchError("the file is empty", hint="download it again"))["position"] is None
    True
    """
    answer: Json = {"message": error.problem, "hint": error.hint, "text": "", "position": None}
    if isinstance(error, AllocationError) and error.text:
        answer |= {"text": error.text, "position": error.position, "length": error.length}
    return answer


def memories_of(machine: Machine) -> list[Json]:
    """Return every memory of a machine, with its bytes.

    >>> memories_of(Machine.load("rtx4070-12gb"))[0]["kind"]
    'accelerator'
    """
    return [
        {
            "device": tier.name,
            "kind": kind_of(tier.name),
            "capacity_bytes": tier.capacity_bytes,
            "free_bytes": tier.free_bytes,
        }
        for tier in machine.tiers
    ]


def links_of(machine: Machine) -> list[Json]:
    """Return every link whose speed is known, in bytes per second.

    >>> links_of(Machine.load("rtx4070-12gb"))[0]["source"]
    'cpu'
    """
    return [
        {
            "source": link.source,
            "target": link.target,
            "bytes_per_second": link.bytes_per_second,
        }
        for link in machine.links
    ]


def kind_of(device: str) -> str:
    """Return what kind of memory a device's name means: accelerator, host or disk.

    >>> kind_of("disk:/mnt/nvme"), kind_of("cuda:1")
    ('disk', 'accelerator')
    """
    return {"cpu": "host", "disk": "disk"}.get(device.partition(":")[0], "accelerator")


def _asked(
    line: Allocation, request: Request, size: int, machine: Machine
) -> list[tuple[str, int | None]]:
    """The bytes of each device, whether or not they fit: as if all memories were large enough."""
    if line.mode != "auto":
        tiers = tuple(replace(tier, free_bytes=MAX_BYTES) for tier in machine.tiers)
        machine = replace(machine, tiers=tiers)
    try:
        return list(line.resolve(size, machine, request.compute).bytes_by_tier)
    except DistorchError:
        return []


def _unsized(line: Allocation, machine: Machine) -> list[tuple[str, int | None]]:
    """The bytes that a line says without knowing the model; None where they depend on it."""
    parts: list[tuple[str, int | None]] = []
    for entry in line.entries:
        nbytes = None
        if line.mode == "bytes" and not entry.rest:
            nbytes = int(entry.amount)
        elif line.mode == "fraction" and (tier := _memory(entry.device, machine)):
            nbytes = int(Fraction(entry.amount) * tier["capacity_bytes"])
        parts.append((entry.device, nbytes))
    return parts


def _shares(line: Allocation) -> dict[str, float]:
    """Each device's share of whatever model, where a line says shares."""
    if line.mode == "bytes" and len(line.entries) == 1 and line.entries[0].rest:
        return {line.entries[0].device: 1.0}
    if line.mode != "ratio":
        return {}
    said = {entry.device: Fraction(entry.amount) for entry in line.entries if not entry.rest}
    rest = [entry.device for entry in line.entries if entry.rest]
    whole = Fraction(100) if rest else sum(said.values(), Fraction(0))
    shares = {device: float(amount / whole) for device, amount in said.items()}
    return shares | {device: 1 - sum(shares.values()) for device in rest}


def _entry(
    device: str, nbytes: int | None, share: float | None, size: int | None, machine: Machine
) -> Json:
    memory = _memory(device, machine) or {"capacity_bytes": None, "free_bytes": None}
    if size and nbytes is not None:
        share = nbytes / size
    return {
        "device": device,
        "kind": kind_of(device),
        "bytes": nbytes,
        "share": share,
        "free_bytes": memory["free_bytes"],
        "capacity_bytes": memory["capacity_bytes"],
    }


def _memory(device: str, machine: Machine) -> Json | None:
    try:
        tier = machine.tier(device)
    except MachineError:
        return None
    return {"capacity_bytes": tier.capacity_bytes, "free_bytes": tier.free_bytes}


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        limit = f"text of at most {MAX_CHARACTERS:,} characters"
        raise DistorchError(f"{name} is not {limit}", hint=f'"{name}": "cpu"')
    return value


def _number(data: Mapping[str, Any], name: str, most: int) -> float | int | None:
    value = data.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise DistorchError(f"{name} is not a number from 0 to {most}", hint=f'"{name}": 4')
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool | None:
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise DistorchError(f"{name} is neither true nor false", hint=f'"{name}": true')
    return value


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
