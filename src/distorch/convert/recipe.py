"""What becomes of each tensor: its name, dtype and shape in the new file. No weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from distorch.convert.architectures import (
    Architecture,
    architecture_named,
    detect,
    matches,
    prefix,
)
from distorch.convert.asked import GGUF_NAMES, Container, container_of, form_for, is_packed
from distorch.convert.shapes import folded, logical_shape
from distorch.errors import FormatError, ModelError
from distorch.formats import DTYPES, SAFETENSORS_DTYPES, Checkpoint, DType, TensorInfo
from distorch.plan.storage import Format

__all__ = ["Output", "Recipe", "recipe_for"]

_FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_MAX_NAME: Final = 127  # what programs in C that read these files keep for a name
_SHOWN: Final = 3  # names in a note
_SCALES: Final = (
    ".scale_weight",
    ".weight_scale",
    ".weight_scale_inv",
    "scaled_fp8",
    ".comfy_quant",
)
# What diffusers decodes; ComfyUI-GGUF knows all that the gguf package does.
_OF_DIFFUSERS: Final = frozenset(
    {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS"}
    | {f"Q{bits}_K" for bits in range(2, 7)}
)


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to be written: from ``source``, in ``dtype``, under ``name`` and in ``shape``.

    ``logical_shape`` is the one that the model has, where ``shape`` is a folded one.
    """

    source: TensorInfo
    name: str
    dtype: DType
    shape: tuple[int, ...]
    logical_shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the new file."""
        return self.dtype.nbytes(self.shape)

    @property
    def is_copy(self) -> bool:
        """Whether the bytes go over as they are."""
        return self.source.dtype == self.dtype.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that is to be written, and what the user should know of it before."""

    container: Container
    format: str
    architecture: str | None
    metadata: Mapping[str, str]
    outputs: tuple[Output, ...]
    notes: tuple[str, ...]


def recipe_for(
    checkpoint: Checkpoint,
    target: Path,
    format: str,  # noqa: A002  what users call it
    *,
    architecture: str | None = None,
    keep: tuple[str, ...] = (),
    class_name: str | None = None,
) -> Recipe:
    """Return what a checkpoint becomes; ``class_name`` is diffusers' in the config beside it.

    Raises:
        ModelError: the format and the suffix of ``target`` contradict each other, or the model
            cannot be stored so.
        FormatError: the checkpoint has no tensors, or contradicts itself.
        StorageError: ``target`` is no name of such a file.
    """
    container = container_of(target)
    form = form_for(format, container)
    if not checkpoint:
        raise FormatError(f"{checkpoint.path} holds no tensors", hint="download it again")
    _refuse_scaled(checkpoint)
    if container == "safetensors":
        if architecture is not None:
            raise ModelError(
                f"--architecture {architecture} was given, which a safetensors file does not say",
                hint=f"leave it out, or write {target.with_suffix('.gguf').name}",
            )
        return _to_safetensors(checkpoint, form, keep)
    model = _architecture(checkpoint, architecture, class_name)
    if model.of_diffusers and form.matrix.name not in _OF_DIFFUSERS:
        raise ModelError(
            f"diffusers, which alone loads {model.name} by these names, does not read {form.name}",
            hint="--format Q4_K",
        )
    return _to_gguf(checkpoint, form, keep, model)


def _refuse_scaled(checkpoint: Checkpoint) -> None:
    """Scales beside the weights would be lost: the numbers without them mean nothing."""
    if any(info.dtype.startswith("F8") for info in checkpoint.values()):
        scale = next((name for name in checkpoint if name.endswith(_SCALES)), None)
        if scale is not None:
            raise ModelError(
                f"{checkpoint.path} is fp8 with scales of its own ({scale:.100})",
                hint="convert the BF16 or F16 version of the model",
            )


def _architecture(
    checkpoint: Checkpoint, asked: str | None, class_name: str | None
) -> Architecture:
    if asked is not None:
        return architecture_named(asked)
    said = checkpoint.metadata.get("general.architecture")
    if checkpoint.format == "gguf" and isinstance(said, str):
        try:
            return architecture_named(said)
        except ModelError as error:
            raise ModelError(
                f"{checkpoint.path} is of the architecture {said!r:.100}, which is not one of "
                "images or videos",
                hint="llama.cpp's llama-quantize; or write safetensors",
            ) from error
    start = prefix(checkpoint)
    return detect({name.removeprefix(start) for name in checkpoint}, class_name)


def _to_safetensors(checkpoint: Checkpoint, form: Format, keep: tuple[str, ...]) -> Recipe:
    """Change dtypes, and nothing else: all tensors, all names, the metadata."""
    outputs = []
    for name, info in checkpoint.items():
        shape = logical_shape(checkpoint, info)
        dtype = DTYPES[info.dtype]
        if _is_number(info) and not matches(name, keep):
            wanted = form.dtype(shape)
            # On the way to fp8 what is not fp8 itself is never widened.
            widens = wanted != form.matrix and dtype.block_bytes <= wanted.block_bytes
            dtype = dtype if widens and not is_packed(dtype.name) else wanted
        if dtype.name not in SAFETENSORS_DTYPES:
            raise ModelError(
                f"a safetensors file cannot keep {name:.100} as {dtype.name}",
                hint="leave out the --keep that matches it",
            )
        outputs.append(Output(info, name, dtype, shape))
    outputs.sort(key=lambda output: -output.dtype.block_bytes)  # so that each begins aligned
    said = {} if checkpoint.format == "gguf" else checkpoint.metadata
    metadata = {key: value for key, value in said.items() if isinstance(value, str)}
    return Recipe(
        container="safetensors",
        format=form.name,
        architecture=None,
        metadata=metadata or {"format": "pt"},
        outputs=tuple(outputs),
        notes=tuple(_requantised(outputs)),
    )


def _to_gguf(
    checkpoint: Checkpoint, form: Format, keep: tuple[str, ...], model: Architecture
) -> Recipe:
    start, outputs, left_out = prefix(checkpoint), [], []
    for full_name, info in checkpoint.items():
        name = full_name.removeprefix(start)
        if not full_name.startswith(start) or matches(name, model.left_out):
            left_out.append(full_name)
            continue
        if len(name) > _MAX_NAME:
            raise ModelError(
                f"{name!r} has {len(name)} characters; a GGUF file names tensors in {_MAX_NAME}",
                hint="an OUT that ends in .safetensors",
            )
        shape = logical_shape(checkpoint, info) or (1,)
        kept = matches(name, keep) or matches(full_name, keep)
        outputs.append(_gguf_output(name, info, shape, form, model, kept=kept))
    return Recipe(
        container="gguf",
        format=form.name,
        architecture=model.name,
        metadata={},
        outputs=tuple(outputs),
        notes=(
            *_requantised(outputs),
            *_unpacked(outputs, form, (*model.kept, *model.exact, *keep)),
            *_counted(left_out, "{} left out, as they are not weights of the model: {}"),
            *_loaded_by(model),
        ),
    )


def _gguf_output(
    name: str,
    info: TensorInfo,
    shape: tuple[int, ...],
    form: Format,
    model: Architecture,
    *,
    kept: bool,
) -> Output:
    if kept or not _is_number(info):
        return Output(info, name, _unchanged(info), shape)
    if matches(name, model.exact):
        return Output(info, name, DTYPES["F32"], shape)
    is_precise = matches(name, model.kept)
    stored = folded(shape) if model.folds and not is_precise else shape
    dtype, unchanged = form.dtype(stored), _unchanged(info)
    if is_precise and _bits(dtype) <= _bits(unchanged):
        dtype = unchanged
    elif dtype not in {form.matrix, form.other} and unchanged.name == "F16":
        dtype = unchanged  # rows that are no whole blocks: BF16, unless that loses something
    return Output(info, name, dtype, stored, None if stored == shape else shape)


def _unchanged(info: TensorInfo) -> DType:
    """Return the dtype that a GGUF file has for the same numbers."""
    if info.dtype == "F64":  # which no program computes with
        return DTYPES["F32"]
    if info.dtype in {"F8_E4M3", "F8_E5M2"}:
        return DTYPES["F16"]  # every number of either is one of these
    if info.dtype not in GGUF_NAMES:
        raise ModelError(
            f"a GGUF file cannot hold {info.name:.100}, which is {info.dtype}",
            hint="an OUT that ends in .safetensors",
        )
    return DTYPES[info.dtype]


def _bits(dtype: DType) -> float:
    return 8 * dtype.block_bytes / dtype.block_elements


def _is_number(info: TensorInfo) -> bool:
    return info.dtype in _FLOATS or is_packed(info.dtype)


def _requantised(outputs: Iterable[Output]) -> Iterable[str]:
    names = [o.name for o in outputs if is_packed(o.source.dtype) and not o.is_copy]
    return _counted(names, "{} decoded from packed weights, which have lost precision before: {}")


def _unpacked(outputs: Iterable[Output], form: Format, spared: tuple[str, ...]) -> Iterable[str]:
    """Matrices that would be packed, if their rows were whole blocks."""
    names = [
        o.name
        for o in outputs
        if _is_number(o.source)
        and form.dtype(o.shape) not in {form.matrix, form.other}
        and not matches(o.name, spared)
    ]
    return _counted(names, f"{{}} not {form.name}, as their rows are no whole blocks of it: {{}}")


def _loaded_by(model: Architecture) -> Iterable[str]:
    if model.of_diffusers:
        yield (
            f"ComfyUI does not load these names; diffusers does, with {model.name}."
            "from_single_file(OUT, config=..., quantization_config=GGUFQuantizationConfig())"
        )


def _counted(names: list[str], text: str) -> Iterable[str]:
    if names:
        more = ", ..." if len(names) > _SHOWN else ""
        count = f"{len(names)} tensor{'s' * (len(names) > 1)}"
        yield text.format(count, ", ".join(f"{name:.100}" for name in names[:_SHOWN]) + more)
