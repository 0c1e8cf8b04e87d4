"""GGML's I formats: the weights of a group are one row of a grid that was chosen beforehand.

Layouts: ``block_iq2_xxs`` and its neighbours in ggml-common.h. The grids are those of the ``gguf``
package, unpacked when a format is first used and kept on each device that used it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name everyone knows
from torch import Tensor

from distorch.quant.block_formats.base import BlockFormat, bits, fields, half, look_up, typed

__all__: list[str] = []


def _quants() -> Any:
    """The tables' home, which only who needs them loads."""
    return import_module("gguf.quants")


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    """The grid of a format: float32 rows of 4 or 8 weights."""
    form = getattr(_quants(), name)
    form.init_grid()
    return _kept(form.grid.reshape(form.grid_shape), device)


@cache
def _values(device: torch.device) -> Tensor:
    """The 16 values of IQ4_NL, which IQ4_XS has too."""
    return _kept(_quants().IQ4_NL.kvalues, device)


@cache
def _even_signs(device: torch.device) -> Tensor:
    """8 signs for each number of 7 bits: the eighth makes the count of minus signs even."""
    index = torch.tensor(list(_quants().IQ2_XXS.ksigns), dtype=torch.int32, device=device)
    return _kept(F.embedding(index, _all_signs(device)), device)


@cache
def _all_signs(device: torch.device) -> Tensor:
    """8 signs for each byte: -1 where a bit is set."""
    flags = torch.arange(256, dtype=torch.uint8, device=device).view(-1, 1)
    return _kept(1 - 2 * bits(flags).float(), device)


def _kept(values: object, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # kept for other modes too
        return torch.as_tensor(values, dtype=torch.float32, device=device).clone()


def _signs(flags: Tensor) -> Tensor:
    """One sign for each bit of ``(n, k)``: ``(n, k, 8)``."""
    return F.embedding(flags.int(), _all_signs(flags.device))


def _words(blocks: Tensor) -> Tensor:
    """Read bytes as 32-bit words; take their fields with a mask, since they may be negative."""
    return typed(blocks, torch.int32)


def _shorts(blocks: Tensor) -> Tensor:
    return typed(blocks, torch.int16).int() & 0xFFFF


def _sevens(words: Tensor) -> Tensor:
    """Look up the 4 x 7 sign bits of each word: ``(n, 4 * words, 8)``."""
    index = torch.stack([words >> at & 127 for at in (0, 7, 14, 21)], dim=-1)
    return F.embedding(index.flatten(1), _even_signs(words.device))


def _of_grid(name: str, index: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
    """Multiply grid rows ``(n, rows)`` by their groups' scales ``(n, groups)`` and their signs."""
    groups = F.embedding(index.int(), _grid(name, index.device)).view(*scale.shape, -1)
    return (scale.unsqueeze(-1) * groups).flatten(1) * signs.flatten(1)


class IQ2_XXS(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 8 groups of 32 weights: 4 grid rows, 4 x 7 sign bits, a 4-bit scale."""

    elements, nbytes = 256, 66

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        groups = blocks[:, 2:].reshape(-1, 8, 8)
        words = _words(groups[:, :, 4:]).view(-1, 8)
        scale = half(blocks, 0) * (0.5 + (words >> 28 & 15).float()) * 0.25
        return _of_grid("IQ2_XXS", groups[:, :, :4].flatten(1), scale, _sevens(words))


class IQ2_XS(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 32 words of a 9-bit grid row and 7 sign bits; 16 four-bit scales."""

    elements, nbytes = 256, 74

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        words = _shorts(blocks[:, 2:66])
        scale = half(blocks, 0) * (0.5 + bits(blocks[:, 66:], 4).float()) * 0.25
        signs = F.embedding(words >> 9, _even_signs(blocks.device))
        return _of_grid("IQ2_XS", words & 511, scale, signs)


class IQ2_S(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 32 grid rows of 8 + 2 bits; 256 signs; 16 four-bit scales."""

    elements, nbytes = 256, 82

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        index = blocks[:, 2:34].int() | bits(blocks[:, 66:74], 2).int() << 8
        scale = half(blocks, 0) * (0.5 + bits(blocks[:, 74:], 4).float()) * 0.25
        return _of_grid("IQ2_S", index, scale, _signs(blocks[:, 34:66]))


class IQ3_XXS(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 64 grid rows of 4 weights; 8 words of 4 x 7 sign bits and a 4-bit scale."""

    elements, nbytes = 256, 98

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        words = _words(blocks[:, 66:])
        scale = half(blocks, 0) * (0.5 + (words >> 28 & 15).float()) * 0.5
        return _of_grid("IQ3_XXS", blocks[:, 2:66], scale, _sevens(words))


class IQ3_S(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 64 grid rows of 8 + 1 bits, 4 weights each; 256 signs; 8 four-bit scales."""

    elements, nbytes = 256, 110

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        index = blocks[:, 2:66].int() | bits(blocks[:, 66:74]).int() << 8
        scale = half(blocks, 0) * (1 + 2 * bits(blocks[:, 106:], 4)).float()
        return _of_grid("IQ3_S", index, scale, _signs(blocks[:, 74:106]))


def _shifted_grid(index: Tensor, scale: Tensor, is_below: Tensor) -> Tensor:
    """Move ternary grid rows by an eighth, down where said, then multiply by the groups' scales."""
    delta = 0.125 - 0.25 * is_below.float()
    rows = F.embedding(index, _grid("IQ1_S", index.device))
    moved = rows.view(*delta.shape, -1) + delta.unsqueeze(-1)
    return (moved.flatten(1).view(*scale.shape, -1) * scale.unsqueeze(-1)).flatten(1)


class IQ1_S(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 32 ternary grid rows of 8 + 3 bits; 8 groups: a 3-bit scale, a shift."""

    elements, nbytes = 256, 50

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        words = _shorts(blocks[:, 34:])
        high = torch.stack([words >> at & 7 for at in (0, 3, 6, 9)], dim=-1).flatten(1)
        scale = half(blocks, 0) * (2 * (words >> 12 & 7) + 1).float()
        return _shifted_grid(blocks[:, 2:34].int() | high << 8, scale, words >> 15)


class IQ1_M(BlockFormat):  # noqa: N801  the format's own name
    """32 ternary grid rows of 8 + 3 bits, each with a shift; 16 three-bit scales.

    The float16 scale is in four pieces: the highest bits of each of four words of small scales.
    """

    elements, nbytes = 256, 56

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        words = _shorts(blocks[:, 48:])
        pieces = blocks[:, 49::2]
        scale_bytes = (pieces[:, ::2] >> 4) | (pieces[:, 1::2] & 0xF0)
        small = torch.stack([words >> at & 7 for at in (0, 3, 6, 9)], dim=-1).flatten(1)
        scale = half(scale_bytes, 0) * (2 * small + 1).float()
        high = bits(blocks[:, 32:48], 4).int()
        return _shifted_grid(blocks[:, :32].int() | (high & 7) << 8, scale, high >> 3)


class IQ4_NL(BlockFormat):  # noqa: N801  the format's own name
    """A float16 scale; 32 nibbles that stand for 16 values, closer together near zero."""

    elements, nbytes = 32, 18

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        q = look_up(_values(blocks.device), fields(blocks[:, 2:], 4))
        return q.reshape(-1, 32) * half(blocks, 0)


class IQ4_XS(BlockFormat):  # noqa: N801  the format's own name
    """IQ4_NL's nibbles in 8 groups; six-bit scales centred on 32 under a float16 scale."""

    elements, nbytes = 256, 136

    @staticmethod
    def decode(blocks: Tensor) -> Tensor:
        scales = bits(blocks[:, 4:8], 4) | bits(blocks[:, 2:4], 2) << 4
        scale = half(blocks, 0) * (scales.to(torch.int8) - 32).float()
        q = look_up(_values(blocks.device), fields(blocks[:, 8:].reshape(-1, 16), 4))
        return (scale.unsqueeze(-1) * q.reshape(-1, 8, 32)).reshape(-1, 256)
