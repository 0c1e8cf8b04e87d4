"""Files in the layouts that people download, as the tensors of diffusers' classes.

Models are published in the layout of their authors, where one tensor may be what diffusers has as
three. diffusers' own converters know the names and the cuts. They are run here on numbered rows in
place of weights: what comes out says which rows of which tensor make each parameter, and these are
then read from the file as they lie, packed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from distorch.errors import ModelError
from distorch.formats import TensorInfo
from distorch.quant.scale import Scale
from distorch.tiers.sources import Amend

__all__ = ["LAYOUTS", "Layout", "Renamed", "bare", "layout_of", "renamed"]

_PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.")
_HARD_CODED_WIDTH: Final = 3072  # in diffusers' converters of FLUX.1, Chroma and HunyuanVideo
_HINT: Final = "the model in diffusers' own layout: a directory with config.json"
_ROW_BITS: Final = 40  # of a numbered row; the tensor's own number stands above


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How to know a model by its tensors, in its authors' layout and in diffusers' own.

    ``width`` names the tensor whose rows are the model's width, where diffusers' converter takes
    that for given; ``forgotten`` are names that it does not know.
    """

    class_name: str
    original: tuple[str, ...]
    converted: tuple[str, ...]
    width: str | None = None
    forgotten: Mapping[str, str] = field(default_factory=dict)


LAYOUTS: Final = (
    Layout(
        class_name="Flux2Transformer2DModel",
        original=("double_stream_modulation_img.lin.weight",),
        converted=("double_stream_modulation_img.linear.weight",),
    ),
    Layout(
        class_name="HunyuanVideoTransformer3DModel",
        original=("double_blocks.0.img_attn_qkv.weight", "txt_in.input_embedder.weight"),
        converted=(
            "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
            "single_transformer_blocks.0.proj_mlp.weight",
        ),
        width="double_blocks.0.img_attn_proj.weight",
    ),
    Layout(
        class_name="FluxTransformer2DModel",
        original=("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
        converted=(
            "single_transformer_blocks.0.proj_mlp.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "x_embedder.weight",
        ),
        width="img_in.weight",
    ),
    Layout(
        class_name="QwenImageTransformer2DModel",
        original=("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
        converted=("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"),
    ),
    Layout(
        class_name="WanTransformer3DModel",
        original=("blocks.0.self_attn.q.weight", "head.modulation"),
        converted=("blocks.0.attn1.to_q.weight", "condition_embedder.time_proj.weight"),
        forgotten={"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"},
    ),
    Layout(
        class_name="ZImageTransformer2DModel",
        original=("cap_pad_token", "layers.0.attention.qkv.weight"),
        converted=("cap_pad_token", "layers.0.attention.to_q.weight"),
    ),
    Layout(
        class_name="SD3Transformer2DModel",
        original=("joint_blocks.0.x_block.attn.qkv.weight",),
        converted=("transformer_blocks.0.norm1_context.linear.weight", "pos_embed.proj.weight"),
    ),
    Layout(
        class_name="LTXVideoTransformer3DModel",
        original=("patchify_proj.weight", "adaln_single.linear.weight"),
        converted=(
            "proj_in.weight",
            "time_embed.linear.weight",
            "caption_projection.linear_1.weight",
        ),
    ),
)
"""The models that are known by their tensors; where several could match, the first does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Renamed:
    """Tensors by diffusers' names; how to order the rows of some of them anew; scales of some."""

    infos: dict[str, TensorInfo]
    amend: dict[str, Amend] = field(default_factory=dict)
    scales: Mapping[str, Scale] = field(default_factory=dict)


def bare(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors of the denoiser, by their names without a prefix.

    A file that holds a text encoder or a VAE besides has a prefix for each.
    """
    for prefix in _PREFIXES:
        found = {
            name.removeprefix(prefix): info
            for name, info in tensors.items()
            if name.startswith(prefix)
        }
        if found:
            return found
    return dict(tensors)


def layout_of(names: Iterable[str]) -> Layout | None:
    """Return the layout of a model by the bare names of its tensors, or None.

    >>> layout_of(["joint_blocks.0.x_block.attn.qkv.weight"]).class_name
    'SD3Transformer2DModel'
    """
    names = set(names)
    for layout in LAYOUTS:
        if names.issuperset(layout.original) or names.issuperset(layout.converted):
            return layout
    return None


def renamed(
    layout: Layout, tensors: Mapping[str, TensorInfo], scales: Mapping[str, Scale]
) -> Renamed:
    """Return a model's tensors by diffusers' names, cut out of those of the file.

    Raises:
        ModelError: diffusers cannot convert the file.
    """
    if set(tensors).issuperset(layout.converted):
        return Renamed(infos=dict(tensors), scales=scales)
    stretch = _stretch(layout, tensors)
    found = Renamed(infos={}, scales=(kept := dict[str, Scale]()))
    sources = list(tensors)
    for converted, rows in _converted(layout, tensors, stretch).items():
        name = layout.forgotten.get(converted, converted)
        runs = _runs(rows, stretch)
        if not runs or len({number for number, _, _ in runs}) > 1:
            raise ModelError(
                f"{name} of a {layout.class_name} is made of several tensors of the file",
                hint=_HINT,
            )
        source, cuts = sources[runs[0][0]], [(first, last) for _, first, last in runs]
        found.infos[name], order = _cut(tensors[source], cuts)
        if order is not None:
            found.amend[name] = order
        if source in scales:
            kept[name] = scales[source].rows(_rows(cuts))
    return found


def _stretch(layout: Layout, infos: Mapping[str, TensorInfo]) -> int:
    """How often to repeat each row, so that a narrow model has the width that is hard-coded."""
    if layout.width is None:
        return 1
    if layout.width not in infos:
        raise ModelError(f"the file lacks {layout.width}", hint="a whole file of one model")
    width = infos[layout.width].shape[0]
    if _HARD_CODED_WIDTH % width:
        raise ModelError(
            f"diffusers converts a {layout.class_name} of width {_HARD_CODED_WIDTH} only, "
            f"and this one has {width}",
            hint=_HINT,
        )
    return _HARD_CODED_WIDTH // width


def _converted(
    layout: Layout, infos: Mapping[str, TensorInfo], stretch: int
) -> Mapping[str, Tensor]:
    """Let diffusers convert numbered rows."""
    known: Any = SINGLE_FILE_LOADABLE_CLASSES
    convert: Callable[..., Mapping[str, Tensor]] = known[layout.class_name]["checkpoint_mapping_fn"]
    numbered = {
        name: _numbered(number, info.shape, stretch)
        for number, (name, info) in enumerate(infos.items())
    }
    try:
        return convert(checkpoint=numbered, config={})
    except Exception as error:
        raise ModelError(
            f"diffusers cannot convert this file to a {layout.class_name}: {error!r}",
            hint="a whole file of one model, in its authors' layout",
        ) from error


def _numbered(number: int, shape: tuple[int, ...], stretch: int) -> Tensor:
    """The rows of a tensor as numbers, with as many dimensions as it has."""
    rows = torch.arange(shape[0] if shape else 1).repeat_interleave(stretch)
    return (rows + (number << _ROW_BITS)).view(-1, *(1 for _ in shape[1:]))


def _runs(rows: Tensor, stretch: int) -> list[tuple[int, int, int]]:
    """The runs that numbered rows are made of: a tensor's number, the first row, and the end."""
    ids = rows.flatten()[::stretch]
    if not len(ids):
        return []
    breaks = (torch.diff(ids) != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(ids)]
    mask = (1 << _ROW_BITS) - 1
    return [
        (int(ids[start]) >> _ROW_BITS, int(ids[start]) & mask, (int(ids[end - 1]) & mask) + 1)
        for start, end in zip(starts, ends, strict=True)
    ]


def _rows(cuts: list[tuple[int, int]]) -> slice | Tensor:
    """The rows that a parameter is made of, in its order."""
    if len(cuts) == 1:
        return slice(*cuts[0])
    return torch.cat([torch.arange(first, last) for first, last in cuts])


def _cut(info: TensorInfo, cuts: list[tuple[int, int]]) -> tuple[TensorInfo, Amend | None]:
    """The rows of a tensor that are a parameter: one stretch of the file, and their order in it."""
    if not info.shape:
        return info, None
    start, end = min(first for first, _ in cuts), max(last for _, last in cuts)
    num_rows = sum(last - first for first, last in cuts)
    assert num_rows == end - start, "a converter moves rows, and drops none between others"
    row_bytes = info.nbytes // info.shape[0]
    part = replace(
        info,
        shape=(num_rows, *info.shape[1:]),
        offset=info.offset + start * row_bytes,
        nbytes=num_rows * row_bytes,
    )
    if len(cuts) == 1:
        return part, None
    order = [slice((a - start) * row_bytes, (b - start) * row_bytes) for a, b in cuts]

    def amend(memory: memoryview) -> None:
        values = np.frombuffer(memory, np.uint8)
        values[:] = np.concatenate([values[rows] for rows in order])

    return part, amend
