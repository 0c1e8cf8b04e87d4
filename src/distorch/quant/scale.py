"""What the stored numbers of a weight are multiplied by to be its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

__all__ = ["Scale"]

_TILE = 128  # rows and columns for one scale, where a file does not say (DeepSeek's)


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """Factors of a weight: one for all of it, one for each row, or one for each tile.

    ``values`` are float32, of shape ``(tiles down, tiles across)``; each is for ``tile`` rows and
    columns of the weight seen as a matrix, the last ones for what is left.

    >>> scale = Scale.fit(torch.tensor([1.0, 10.0]), (2, 3))
    >>> scale.multiply(torch.ones(2, 3))
    tensor([[ 1.,  1.,  1.],
            [10., 10., 10.]])
    """

    values: Tensor
    tile: tuple[int, int]

    @classmethod
    def fit(
        cls, values: Tensor, shape: Sequence[int], tile: tuple[int, int] = (_TILE, _TILE)
    ) -> Scale | None:
        """Return the scale of a weight of ``shape``; None if ``values`` have the shape of none.

        One value is for the whole weight, as many as it has rows are for these, a matrix of as many
        rows for groups of columns, and any other matrix for tiles of the size of ``tile``.
        """
        rows = shape[0] if shape else 1
        columns = prod(shape[1:])
        values = values.float()
        if values.numel() == 1:
            return cls(values.reshape(1, 1), (rows, columns))
        if values.numel() == rows == values.shape[0]:
            return cls(values.reshape(rows, 1), (1, columns))
        if values.dim() != 2 or not values.numel():  # noqa: PLR2004  a matrix
            return None
        down, across = values.shape
        if down == rows and columns % across == 0:
            return cls(values, (1, columns // across))
        tiles = -(-rows // tile[0]), -(-columns // tile[1])
        return cls(values, tile) if (down, across) == tiles else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.values.nbytes

    def on(self, device: torch.device | str, *, non_blocking: bool = False) -> Scale:
        """Return it in the memory of ``device``."""
        return replace(self, values=self.values.to(device, non_blocking=non_blocking))

    def rows(self, rows: slice | Tensor) -> Scale:
        """Return the scale of some of the weight's rows: a run of them, or those that are named."""
        height, width = self.tile
        if len(self.values) == 1:
            return self
        if isinstance(rows, slice):
            if rows.start % height == 0:
                return replace(
                    self, values=self.values[rows.start // height : -(-rows.stop // height)]
                )
            rows = torch.arange(rows.start, rows.stop)
        places = rows.to(self.values.device) // height
        return Scale(self.values.index_select(0, places), (1, width))

    def multiply(self, weight: Tensor) -> Tensor:
        """Multiply a float32 matrix in place, each element once, and return it."""
        height, width = self.tile
        factors = self.values
        if len(factors) > 1 and height > 1:
            factors = factors.repeat_interleave(height, 0)[: len(weight)]
        for number, piece in enumerate(weight.split(width, dim=1)):
            piece.mul_(factors[:, number, None])
        return weight
