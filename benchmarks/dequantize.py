"""How fast packed blocks become float32: our kernel, our torch decoder, libgguf, gguf-py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from common import Figures, Quartiles, in_turn, seconds_of, torch_threads
from numpy.typing import NDArray

from distorch.cli.output import show_table
from distorch.quant.block_formats import block_format
from distorch.quant.native import kernel

NUM_ROUNDS = 5
_FORMATS = ("Q8_0", "Q5_0", "Q4_K", "Q6_K")
_THREADS = (1, 2)
_NUM_WEIGHTS = 1 << 24  # 9 to 18 MB packed
_TILE_WEIGHTS = 1 << 19  # what a linear layer decodes at once: its float32 stays in the cache

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
    kind = gguf.GGMLQuantizationType[name]
    form = block_format(name)
    native = kernel(name)

    def by_torch(packed: Bytes, out: NDArray[np.float32]) -> None:
        blocks = torch.from_numpy(packed).view(-1, form.nbytes)
        torch.from_numpy(out).view(-1, form.elements).copy_(form.decode(blocks))

    def by_gguf(packed: Bytes, out: NDArray[np.float32]) -> None:
        out[:] = gguf.quants.dequantize(packed, kind)

    found = [Decoder("torch", by_torch, pooled=False), Decoder("gguf-py", by_gguf, pooled=True)]
    if native is not None:

        def by_kernel(packed: Bytes, out: NDArray[np.float32]) -> None:
            native(packed.ctypes.data, out.ctypes.data, packed.size // form.nbytes)

        found.insert(0, Decoder("kernel", by_kernel, pooled=False))
    return [*found, *_libgguf(int(kind))]


def _libgguf(kind: int) -> list[Decoder]:
    try:
        import libgguf
    except ImportError:
        return []

    def decode(packed: Bytes, out: NDArray[np.float32]) -> None:
        libgguf.dequantize_rows_into_raw(kind, packed, out, 1, out.size)

    return [Decoder("libgguf", decode, pooled=True)]


def _packed(name: str) -> list[Bytes]:
    """Random blocks with sound scales, cut into tiles."""
    form = block_format(name)
    random = np.random.default_rng(0)
    num_blocks = _NUM_WEIGHTS // form.elements
    blocks = random.integers(0, 256, (num_blocks, form.nbytes), np.uint8)
    blocks[:, _scale_bytes(name)] = random.integers(0x20, 0x30, blocks[:, _scale_bytes(name)].shape)
    return list(blocks.reshape(_NUM_WEIGHTS // _TILE_WEIGHTS, -1))


def _scale_bytes(name: str) -> list[int]:
    """Where the upper bytes of a block's float16 scales are: there a random one could be NaN."""
    return {"Q8_0": [1], "Q5_0": [1], "Q4_K": [1, 3], "Q6_K": [209]}[name]


def run(num_rounds: int = NUM_ROUNDS) -> Figures:
    """Measure, print, and return the figures."""
    figures: Figures = {}
    rows = []
    names = ("kernel", "torch", "libgguf", "gguf-py")
    for form in _FORMATS:
        tiles, contenders = _packed(form), decoders(form)
        for threads in _THREADS:
            speeds = _measure(tiles, contenders, threads, num_rounds)
            figures[f"{form} x {threads}"] = {name: q.figures for name, q in speeds.items()}
            per_weight = tiles[0].size / _TILE_WEIGHTS
            cells = [_cell(speeds.get(name), per_weight) for name in names]
            rows.append(
                [form, str(threads), *cells, ", ".join(_unequal(tiles[0], contenders)) or "all"]
            )
    print("G weights/s (GB/s of packed bytes), by tiles of 2 MiB of float32 in reused memory")
    show_table(("x threads", *names, "equal"), rows)
    return figures


def _measure(
    tiles: Sequence[Bytes], contenders: Sequence[Decoder], threads: int, num_rounds: int
) -> dict[str, Quartiles]:
    """Return the weights per second of each contender, measured in turn."""
    outs = [np.empty(_TILE_WEIGHTS, np.float32) for _ in range(threads)]
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    with torch_threads(threads):
        for contender in contenders:
            contender.work(tiles[:threads], outs)
        for number in range(num_rounds):
            for contender in in_turn(contenders, number):
                job = seconds_of(lambda contender=contender: contender.work(tiles, outs))
                seconds[contender.name].append(job)
    return {
        name: Quartiles.of([_NUM_WEIGHTS / s for s in times]) for name, times in seconds.items()
    }


def _cell(speed: Quartiles | None, bytes_per_weight: float) -> str:
    if speed is None:
        return "-"
    return f"{speed.median / 1e9:.2f} ({speed.median * bytes_per_weight / 1e9:.2f})"


def _unequal(tile: Bytes, contenders: Sequence[Decoder]) -> list[str]:
    """Name who differs from gguf-py in a bit."""
    decoded = {}
    for contender in contenders:
        decoded[contender.name] = np.empty(_TILE_WEIGHTS, np.float32)
        contender.decode(tile, decoded[contender.name])
    expected = decoded["gguf-py"].view(np.uint32)
    return [f"not {n}" for n, out in decoded.items() if (out.view(np.uint32) != expected).any()]


if __name__ == "__main__":
    run()
