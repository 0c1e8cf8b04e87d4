"""How fast packed blocks become float32: ours, other people's decoders, and the plainest C.

Ours is the C kernel where there is one. ``dequantize_reference.c`` is what a C compiler makes of
plain loops; diffusers' decoders keep float16 scales, so what they return differs in its last bits.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from common import Figures, Quartiles, in_turn, seconds_of, torch_threads
from numpy.typing import NDArray

from distorch.cli.output import show_table
from distorch.compiler import build_library
from distorch.quant.block_formats import block_format
from distorch.quant.dequantize import decoder_of, dequantize

NUM_ROUNDS = 5
_FORMATS = (
    *("Q8_0", "Q4_K", "Q5_K", "Q6_K", "F8_E4M3", "F8_E5M2", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4", "F16", "BF16"),
    *("IQ2_XXS", "IQ2_S", "IQ3_S", "IQ1_S", "TQ2_0"),  # by torch
)
_NAMES = ("ours", "plain C", "libgguf", "torch", "diffusers", "gguf-py")
_RATIOS = {"to gguf-py": ("ours", "gguf-py"), "C to ours": ("plain C", "ours")}
_THREADS = (1, 2)
_NUM_WEIGHTS = 1 << 23  # 2 to 16 MB packed
_TILE_WEIGHTS = 1 << 19  # what a linear layer decodes at once: its float32 stays in the cache
_REFERENCE = Path(__file__).with_name("dequantize_reference.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off")

Bytes = NDArray[np.uint8]
Decode = Callable[[Bytes, NDArray[np.float32]], object]
"""Decodes packed blocks into float32 memory."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """One contender; ``pooled`` if several threads have to be ours, since it starts none itself."""

    name: str
    decode: Decode
    pooled: bool

    def work(self, tiles: Sequence[Bytes], outs: Sequence[NDArray[np.float32]]) -> None:
        """Decode all tiles, each worker into the one buffer it has."""
        if not self.pooled or len(outs) == 1:
            self._all(tiles, outs[0])
            return
        with ThreadPoolExecutor(len(outs)) as pool:
            shares = [tiles[first :: len(outs)] for first in range(len(outs))]
            list(pool.map(self._all, shares, outs))

    def _all(self, tiles: Sequence[Bytes], out: NDArray[np.float32]) -> None:
        for tile in tiles:
            self.decode(tile, out)


def decoders(name: str) -> list[Decoder]:
    """Return who can decode a block format here."""
    form = block_format(name)

    def ours(packed: Bytes, out: NDArray[np.float32]) -> None:
        dequantize(torch.from_numpy(packed), form, torch.from_numpy(out))

    def by_torch(packed: Bytes, out: NDArray[np.float32]) -> None:
        blocks = torch.from_numpy(packed).view(-1, form.nbytes)
        torch.from_numpy(out).view(-1, form.elements).copy_(form.decode(blocks))

    found = [Decoder("ours", ours, pooled=False), Decoder("torch", by_torch, pooled=False)]
    kind = gguf.GGMLQuantizationType.__members__.get(name)
    if kind is not None:

        def by_gguf(packed: Bytes, out: NDArray[np.float32]) -> None:
            out[:] = gguf.quants.dequantize(packed, kind)

        found.append(Decoder("gguf-py", by_gguf, pooled=True))
        found += [*_diffusers(kind), *_libgguf(int(kind))]
    return [*found, *_in_plain_c(name)]


def _in_plain_c(name: str) -> list[Decoder]:
    function = getattr(_reference(), f"reference_{name.lower()}", None)
    if function is None:
        return []
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    form = block_format(name)
    if form.nbytes == 1:
        numbers = form.decode(torch.arange(256, dtype=torch.uint8).view(-1, 1))
        table = (ctypes.c_float * 256).in_dll(_reference(), "reference_table")
        table[:] = numbers.view(-1).tolist()

    def decode(packed: Bytes, out: NDArray[np.float32]) -> None:
        function(packed.ctypes.data, out.ctypes.data, packed.size // form.nbytes)

    return [Decoder("plain C", decode, pooled=True)]


@cache
def _reference() -> ctypes.CDLL:
    source = {_REFERENCE.name: _REFERENCE.read_bytes()}
    built = build_library(
        "reference", source, language="c", flags=_FLAGS, depends_on=platform.node(),
        timeout_seconds=60,
    )  # fmt: skip
    return ctypes.CDLL(str(built))


def _diffusers(kind: gguf.GGMLQuantizationType) -> list[Decoder]:
    try:
        from diffusers.quantizers.gguf import utils
    except ImportError:
        return []
    function = utils.dequantize_functions.get(kind)
    if function is None:
        return []
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]

    def decode(packed: Bytes, out: NDArray[np.float32]) -> None:
        decoded = function(torch.from_numpy(packed).view(-1, nbytes), elements, nbytes)
        torch.from_numpy(out).copy_(decoded.reshape(-1))

    return [Decoder("diffusers", decode, pooled=False)]


def _libgguf(kind: int) -> list[Decoder]:
    try:
        import libgguf
    except ImportError:
        return []

    def decode(packed: Bytes, out: NDArray[np.float32]) -> None:
        libgguf.dequantize_rows_into_raw(kind, packed, out, 1, out.size)

    elements, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    try:
        decode(np.zeros(nbytes, np.uint8), np.empty(elements, np.float32))
    except ValueError:  # not one of its formats
        return []
    return [Decoder("libgguf", decode, pooled=True)]


def _packed(name: str) -> list[Bytes]:
    """Random blocks, cut into tiles; no byte can be a NaN's, wherever the scales are."""
    form = block_format(name)
    shape = _NUM_WEIGHTS // _TILE_WEIGHTS, _TILE_WEIGHTS // form.elements * form.nbytes
    return list(np.random.default_rng(0).integers(0, 0x78, shape, np.uint8))


def run(num_rounds: int = NUM_ROUNDS) -> Figures:
    """Measure, print, and return the figures."""
    figures: Figures = {}
    rows = []
    unequal: dict[str, list[str]] = {}
    for form in _FORMATS:
        tiles, contenders = _packed(form), decoders(form)
        for threads in _THREADS:
            speeds, ratios = _measure(tiles, contenders, threads, num_rounds)
            measured = {name: q.figures for name, q in (speeds | ratios).items()}
            figures[f"{form} x {threads}"] = measured
            cells = [_cell(speeds.get(name)) for name in _NAMES]
            times = [_cell(ratios.get(name)) for name in _RATIOS]
            by = "" if decoder_of(block_format(form), "cpu") != "torch" else " by torch"
            rows.append([f"{form}{by}", str(threads), *cells, *times])
        for contender in _unequal(tiles[0], contenders):
            unequal.setdefault(contender, []).append(form)
    print("G weights/s, by tiles of 2 MiB of float32 in reused memory; and ratios within a round")
    show_table(("", "x", *_NAMES, *_RATIOS), rows)
    for contender, forms in unequal.items():
        print(f"not the bits of gguf-py: {contender} in {', '.join(forms)}")
    return figures


def _measure(
    tiles: Sequence[Bytes], contenders: Sequence[Decoder], threads: int, num_rounds: int
) -> tuple[dict[str, Quartiles], dict[str, Quartiles]]:
    """Return G weights a second of each contender, measured in turn, and ratios of these."""
    outs = [np.empty(_TILE_WEIGHTS, np.float32) for _ in range(threads)]
    speeds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with torch_threads(threads):
        for contender in contenders:
            contender.work(tiles[:threads], outs)
        for number in range(num_rounds):
            for contender in in_turn(contenders, number):
                job = seconds_of(lambda contender=contender: contender.work(tiles, outs))
                speeds[contender.name].append(_NUM_WEIGHTS / job / 1e9)
    ratios = {}
    for title, (one, other) in _RATIOS.items():
        if one in speeds and other in speeds:
            pairs = zip(speeds[one], speeds[other], strict=True)
            ratios[title] = Quartiles.of([a / b for a, b in pairs])
    return {name: Quartiles.of(found) for name, found in speeds.items()}, ratios


def _cell(value: Quartiles | None) -> str:
    return "-" if value is None else f"{value.median:.2f}"


def _unequal(tile: Bytes, contenders: Sequence[Decoder]) -> list[str]:
    """Name who differs from gguf-py in a bit; where that cannot decode, from torch."""
    decoded = {}
    for contender in contenders:
        decoded[contender.name] = np.empty(_TILE_WEIGHTS, np.float32)
        contender.decode(tile, decoded[contender.name])
    expected = decoded.get("gguf-py", decoded["torch"]).view(np.uint32)
    return [name for name, out in decoded.items() if (out.view(np.uint32) != expected).any()]


if __name__ == "__main__":
    run()
