"""Brings the blocks of a model to where they rest, and gives up what they came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from distorch.errors import DistorchError, ExecutorError
from distorch.integrations.module_tree import Weight
from distorch.plan.blocks import Block
from distorch.plan.plan import Plan
from distorch.tiers import Source, Store
from distorch.tiers.accelerator import AcceleratorTier
from distorch.tiers.host import HostTier
from distorch.tiers.memory import allocate, allocate_pages, view_bytes

__all__ = ["Originals", "Progress", "fill", "lost"]

Progress = Callable[[int, int], None]
"""Called with the bytes placed so far and the bytes of the model."""


class Originals(Mapping[str, memoryview]):
    """The bytes of a module's parameters, wherever they are; looked at when they are asked for."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._weights = weights
        self._fetched: tuple[str, memoryview] | None = None

    def __getitem__(self, name: str) -> memoryview:
        """Return a parameter's bytes; from a device it is fetched, once for all of its runs."""
        found = self._weights[name].memory
        if found.device.type == "cpu":
            return view_bytes(found)
        if self._fetched is None or self._fetched[0] != name:
            self._fetched = name, view_bytes(found.cpu())
        return self._fetched[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def fill(
    plan: Plan,
    stores: Mapping[str, Store],
    source: Source,
    *,
    kept: Collection[str],
    originals: Mapping[str, Weight],
    progress: Progress | None,
) -> None:
    """Bring each block to where it rests.

    ``kept`` are weights that stay in the module's own tensors. Each of ``originals`` is emptied as
    soon as its last row has a place, so that a model is not in memory twice; when something fails,
    they have their values back.
    """
    left = Counter(part.tensor for placed in plan.placements for part in placed.block.parts)
    done_bytes = 0
    emptied: list[str] = []
    try:
        for placement in plan.placements:
            block, store = placement.block, stores[placement.tier]
            if _stays(block, kept):
                assert isinstance(store, HostTier | AcceleratorTier), "it stays in memory"
                store.adopt(block)
            else:
                store.put(block, source)
                for part in block.parts:
                    left[part.tensor] -= 1
                    if not left[part.tensor] and part.tensor in originals:
                        originals[part.tensor].empty()
                        emptied.append(part.tensor)
            done_bytes += block.nbytes
            if progress is not None:
                progress(done_bytes, plan.model_bytes)
    except BaseException as error:
        gone = _read_all_back([originals[name] for name in emptied], plan, stores)
        if gone:
            raise lost(gone) from error
        raise
    for store in stores.values():
        if isinstance(store, AcceleratorTier):
            store.settle()


def lost(gone: Mapping[str, Exception]) -> ExecutorError:
    """Return the error that says which weights cannot be brought back, and why."""
    name, error = next(iter(gone.items()))
    why = error.problem if isinstance(error, DistorchError) else str(error).partition("\n")[0]
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return ExecutorError(
        f"{name}{more} cannot be brought back: {why}", hint="build or load the model again"
    )


def _stays(block: Block, kept: Collection[str]) -> bool:
    return block.parts[0].tensor in kept


def _read_all_back(
    weights: Sequence[Weight], plan: Plan, stores: Mapping[str, Store]
) -> dict[str, Exception]:
    """Give emptied parameters their values again; return what keeps some from it."""
    gone: dict[str, Exception] = {}
    for weight in weights:
        try:
            _read_back(weight, plan, stores)
        except (RuntimeError, OSError) as error:
            gone[weight.name] = error
    return gone


def _read_back(weight: Weight, plan: Plan, stores: Mapping[str, Store]) -> None:
    """Give an emptied parameter its values again, from where they rest by now."""
    rows = []
    for placement in plan.placements:
        for number, part in enumerate(placement.block.parts):
            if part.tensor == weight.name:
                store, slot = stores[placement.tier], allocate_pages(placement.block.slot_bytes)
                store.read([(placement.block, view_bytes(slot))])
                begin = store.offsets(placement.block)[number]
                rows.append((part.first_row, slot[begin : begin + part.nbytes]))
    raw = allocate(sum(len(piece) for _, piece in rows))
    filled = 0
    for _, piece in sorted(rows, key=lambda row: row[0]):
        raw[filled : filled + len(piece)] = piece
        filled += len(piece)
    weight.fill(raw)
