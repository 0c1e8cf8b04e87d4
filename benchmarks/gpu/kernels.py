"""How fast a device turns packed weights into bfloat16, against what its memory could do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from distorch.quant.block_formats import BlockFormat, block_format
from distorch.quant.dequantize import decoder_of, dequantize
from gpu.arena import first_line
from gpu.cases import Clock
from gpu.device import Device, Figures

_FORMATS = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "F8_E4M3", "F8_E5M2")
_ROWS = (1, 4, 16)
_BITS_SET_APART = 0xBF  # with this one off no scale is 2 or more, and no fp8 number is NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How many there are, as square matrices: more than a cache holds, used in turn."""

    side: int = 4096
    matrices: int = 16
    rounds: int = 5


TINY = Weights(side=256, matrices=2, rounds=2)


def measure_kernels(device: Device, weights: Weights, clock: Clock) -> Figures:
    """Measure the memory, then each format; what cannot be measured is named."""
    bandwidth = _bandwidth(device, weights)
    clock.say(f"kernels: memory reads and writes {bandwidth / 1e9:.3g} GB/s")
    found: Figures = {"memory": bandwidth, "decoding": {}, "products": {}}
    for name in _FORMATS:
        form = block_format(name)
        try:
            packed = _packed(device, form, weights)
            found["decoding"][name] = _decoding(device, form, packed, weights, bandwidth)
            found["products"][name] = _products(device, form, packed, weights)
        except Exception as error:  # noqa: BLE001  the other formats still have their turn
            found["decoding"].setdefault(name, {"failed": first_line(error)})
        device.tidy()
    return found


def decoding_table(found: Figures) -> Iterator[list[str]]:
    """Rows for people: who decodes at which speed, in how many times the ideal time."""
    yield ["format", "who", "GB/s", "x ideal time", "equal"]
    for name, row in found["decoding"].items():
        for who, figures in row.items():
            if isinstance(figures, str):
                yield [name, f"{who}: {figures}", "", "", ""]
                continue
            speed = f"{figures['bytes_per_second'] / 1e9:.3g}"
            equal = {True: "yes", False: "NO"}[figures["bits_equal"]]
            yield [name, who, speed, f"{figures['times_ideal']:.2f}", equal]


def products_table(found: Figures) -> Iterator[list[str]]:
    """Rows for people: microseconds of a product, by rows of the input."""
    yield ["format", "rows", "dense us", "decode, multiply us", "fused us"]
    for name, products in found["products"].items():
        for rows, figures in products.items():
            times = (figures.get(who) for who in ("dense", "decoded", "fused"))
            yield [name, rows, *("-" if time is None else f"{1e6 * time:.1f}" for time in times)]


def _packed(device: Device, form: type[BlockFormat], weights: Weights) -> Tensor:
    """Random blocks, a row for each matrix."""
    nbytes = weights.side**2 // form.elements * form.nbytes
    random = torch.Generator().manual_seed(0)
    packed = torch.randint(
        256, (weights.matrices, nbytes), generator=random, dtype=torch.uint8
    ).bitwise_and_(_BITS_SET_APART)
    return packed.to(device.torch)


def _bandwidth(device: Device, weights: Weights) -> float:
    source = torch.zeros(weights.matrices, weights.side**2, device=device.torch).bfloat16()
    out = torch.empty_like(source)
    return 2 * source.nbytes / _best(device, weights, lambda: out.copy_(source))


def _best(device: Device, weights: Weights, job: Callable[[], object]) -> float:
    """The least seconds; what is done once has been done before."""
    device.seconds(job)
    return min(device.seconds(job) for _ in range(weights.rounds))


def _decoding(
    device: Device, form: type[BlockFormat], packed: Tensor, weights: Weights, bandwidth: float
) -> Figures:
    out = torch.empty(packed.shape[0], weights.side**2, dtype=torch.bfloat16, device=device.torch)
    expected = torch.stack([_by_torch(form, matrix) for matrix in packed])
    moved = packed.nbytes + out.nbytes
    found: Figures = {}
    for who, decode in _decoders(device, form).items():

        def job(decode: Callable[[Tensor, Tensor], object] = decode) -> None:
            for matrix, place in zip(packed, out, strict=True):
                decode(matrix, place)

        out.zero_()
        try:
            seconds = _best(device, weights, job)
        except Exception as error:  # noqa: BLE001  of another project, say
            found[who] = f"failed: {first_line(error)}"
            continue
        found[who] = {
            "bytes_per_second": moved / seconds,
            "times_ideal": seconds * bandwidth / moved,
            "bits_equal": torch.equal(out, expected),
        }
    return found


def _decoders(
    device: Device, form: type[BlockFormat]
) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """Who can decode a format here, by name."""
    by_us = f"ours: {decoder_of(form, device.torch, torch.bfloat16)}"
    found: dict[str, Callable[[Tensor, Tensor], object]] = {
        by_us: lambda packed, out: dequantize(packed, form, out),
        "torch": lambda packed, out: out.copy_(_by_torch(form, packed)),
    }
    try:
        kind = import_module("gguf").GGMLQuantizationType[form.name]
        theirs = import_module("diffusers.quantizers.gguf.utils").dequantize_functions[kind]
    except (ImportError, KeyError):
        return found

    def by_diffusers(packed: Tensor, out: Tensor) -> None:
        blocks = packed.view(-1, form.nbytes)
        out.copy_(theirs(blocks, form.elements, form.nbytes, torch.bfloat16).view(-1))

    return found | {"diffusers": by_diffusers}


def _by_torch(form: type[BlockFormat], packed: Tensor) -> Tensor:
    return form.decode(packed.view(-1, form.nbytes)).view(-1).bfloat16()


def _products(
    device: Device, form: type[BlockFormat], packed: Tensor, weights: Weights
) -> dict[str, Figures]:
    """Seconds of a product with each number of rows: dense, decoded first, decoded on the way."""
    shape = weights.side, weights.side
    place = torch.empty(shape, dtype=torch.bfloat16, device=device.torch)
    dense = [_by_torch(form, matrix).view(shape) for matrix in packed]
    is_ours = decoder_of(form, device.torch, torch.bfloat16).startswith("Triton")
    fused = import_module("distorch.quant.triton_kernels").linear if is_ours else None
    found: dict[str, Figures] = {}
    for rows in _ROWS:
        x = torch.ones(rows, weights.side, dtype=torch.bfloat16, device=device.torch)
        ways: dict[str, Callable[[int], object]] = {
            "dense": lambda number, x=x: F.linear(x, dense[number]),  # type: ignore[misc]
            "decoded": lambda number, x=x: F.linear(  # type: ignore[misc]
                x, dequantize(packed[number], form, place)
            ),
        }
        if fused is not None:
            ways["fused"] = lambda number, x=x: fused(x, packed[number], form, None)  # type: ignore[misc]
        found[str(rows)] = {
            who: _best(device, weights, lambda way=way: [*map(way, range(len(packed)))])
            / len(packed)
            for who, way in ways.items()
        }
    return found
