"""The arguments that commands share, and what they ask for: a `Placement`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from distorch.allocation import Allocation
from distorch.errors import AllocationError
from distorch.machine import Machine
from distorch.sizes import read_size

__all__ = [
    "AllocationOption",
    "BatchOption",
    "ComputeDtypeOption",
    "ComputeOption",
    "DonorOption",
    "FormatOption",
    "FramesOption",
    "JsonOption",
    "MachineOption",
    "ModelArgument",
    "NamedModel",
    "Placement",
    "PlotOption",
    "RingOption",
    "SizeOption",
    "TokensOption",
    "VirtualVramOption",
    "WeightDtypeOption",
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A GGUF file, a directory with safetensors, or the word 'demo'.",
        show_default=False,
    ),
]
NamedModel = typer.Argument(
    metavar="MODEL",
    help="A model by name, a configuration, a GGUF file, a safetensors directory, or 'demo'.",
    show_default=False,
)
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw it: a .png, .svg or .html file.")
]
MachineOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The machine: rtx4070-12gb or another that is known, or a TOML file; else this one.",
    ),
]
SizeOption = Annotated[str | None, typer.Option(metavar="WxH", help="Pixels: 1328x1328.")]
FramesOption = Annotated[int | None, typer.Option(metavar="N", min=1, help="Frames of a video.")]
TokensOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Tokens of text; 1 is decoding.")
]
BatchOption = Annotated[int, typer.Option(metavar="N", min=1, help="How many at once.")]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="How weights are stored: bf16, fp8, Q4_K, ..."),
]
WeightDtypeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Bring weights into a format: fp8_e4m3fn, q8_0, bf16, ..."),
]
ComputeDtypeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the model computes in: float32, bfloat16, float16."),
]
AllocationOption = Annotated[
    str | None,
    typer.Option(
        "--allocation", metavar="LINE", help='Which memory holds what: "cpu,64mb;disk,*".'
    ),
]
VirtualVramOption = Annotated[
    float | None,
    typer.Option(metavar="GB", help="Instead of a line: so many GiB rest on the donor."),
]
DonorOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICES", help="The donors of --virtual-vram, in order: disk, cpu, ..."),
]
ComputeOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="The compute device, if not the first of the line."),
]
RingOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="At most so much for weights that visit: 200mb."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the weights shall rest, as asked; a mistake that can be seen here is an error here.

    >>> Placement(ring="200mb").ring_bytes
    209715200
    """

    allocation: str | None = None
    virtual_vram: float | None = None
    donor: str | None = None
    compute: str | None = None
    ring: str | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, and a line or a size that does not read."""
        if self.allocation is not None and self.virtual_vram is not None:
            raise AllocationError(
                "--allocation and --virtual-vram were both given, and each says where weights rest",
                hint=f"one of them: --allocation '{self.allocation}'",
            )
        if self.donor is not None and self.virtual_vram is None:
            raise AllocationError(
                f"--donor {self.donor} was given without --virtual-vram",
                hint=f"--virtual-vram 8 --donor {self.donor}",
            )
        self._parsed()
        _ = self.ring_bytes

    @property
    def ring_bytes(self) -> int | None:
        """The bound on the ring in bytes; None where none was given."""
        if self.ring is None:
            return None
        try:
            return read_size(self.ring)
        except ValueError as error:
            problem = f"--ring is {self.ring!r}, which is not a size"
            raise AllocationError(problem, hint="--ring 200mb") from error

    def line(self, model_bytes: int, machine: Machine) -> Allocation:
        """Return the allocation that this asks for, on this machine."""
        if self.virtual_vram is None:
            return self._parsed()
        return Allocation.virtual(self.virtual_vram, self.donor, self.compute, model_bytes, machine)

    def _parsed(self) -> Allocation:
        return Allocation.parse("auto" if self.allocation is None else self.allocation)
