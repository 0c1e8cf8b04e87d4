"""Models and text encoders from GGUF files, by our own reader: packed as stored, under ComfyUI."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from distorch.errors import DistorchError, ModelError
from distorch.formats import Checkpoint, TensorInfo, open_checkpoint
from distorch.integrations.comfyui import gguf_names
from distorch.integrations.comfyui.in_comfy.gguf_ops import PackedPatcher, operations
from distorch.integrations.comfyui.sentencepiece import model_of
from distorch.integrations.resting import TORCH_DTYPES
from distorch.quant.block_formats import block_format
from distorch.quant.tensor import QuantTensor

__all__ = ["load_clip", "load_model"]

_SMALL = 1 << 14  # elements: decoded at once, since ComfyUI reads small ones in its own ways

Path = str | os.PathLike[str]
StateDict = dict[str, Tensor]


def load_model(
    path: Path,
    dequant_dtype: str | torch.dtype | None = None,
    patch_dtype: str | torch.dtype | None = None,
    patch_on_device: bool = False,
    **_: Any,
) -> comfy.model_patcher.ModelPatcher:
    """Return the diffusion model of a GGUF file, its weights packed as the file stores them.

    ``dequant_dtype`` is a dtype that decoded weights are rounded to on the way to the one that the
    model computes in, ``patch_dtype`` the one that LoRA is applied in; "default", "target" and None
    leave both to the model. ``patch_on_device`` is there for saved workflows: ComfyUI brings a LoRA
    to the device in any case.

    Raises:
        FormatError: the file is damaged.
        ModelError: a block format cannot be computed with, or ComfyUI does not know the model.
    """
    with open_checkpoint(path) as checkpoint:
        if gguf_names.is_language_model(checkpoint.metadata):
            raise ModelError(
                f"{path} is a text encoder, not a diffusion model",
                hint="CLIPLoaderGGUF loads it",
            )
        state = _state_of(checkpoint)
    ops = operations(_dtype(dequant_dtype), _dtype(patch_dtype))
    load = comfy.sd.load_diffusion_model_state_dict
    patcher = load(state, model_options={"custom_operations": ops}, **_plainly(load))
    if patcher is None:
        raise ModelError(
            f"{path}: ComfyUI does not know what model this is",
            hint="a GGUF file of a model that this ComfyUI supports, or a newer ComfyUI",
        )
    _own(patcher)
    patcher.cached_patcher_init = (load_model, (path, dequant_dtype, patch_dtype, patch_on_device))
    return patcher


def load_clip(paths: Sequence[Path], clip_type: Any, **_: Any) -> comfy.sd.CLIP:
    """Return the text encoder of one file or several, each in GGUF or another format.

    ``clip_type`` is ComfyUI's `CLIPType`, or its name as the loaders have it ("flux").

    Raises:
        FormatError: a file is damaged.
        ModelError: a block format or an architecture that cannot be loaded.
    """
    states = [_encoder_of(path) for path in paths]
    kind = clip_type
    if isinstance(clip_type, str):
        kinds = comfy.sd.CLIPType
        kind = getattr(kinds, clip_type.upper(), kinds.STABLE_DIFFUSION)
    load = comfy.sd.load_text_encoder_state_dicts
    clip = load(
        clip_type=kind,
        state_dicts=states,
        model_options={
            "custom_operations": operations(None, None),
            "initial_device": comfy.model_management.text_encoder_offload_device(),
        },
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        **_plainly(load),
    )
    _own(clip.patcher)
    clip.patcher.cached_patcher_init = (_patcher_of_clip, (paths, clip_type))
    return clip


def _own(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Have a patcher know its weights as packed ones."""
    patcher.__class__ = PackedPatcher
    patcher.size = 0  # it was counted before they were read: to be counted again


def _patcher_of_clip(paths: Sequence[Path], clip_type: Any, **more: Any) -> Any:
    return load_clip(paths, clip_type, **more).patcher


def _plainly(load: Callable[..., Any]) -> dict[str, bool]:
    """Ask for a patcher that moves whole layers, where ComfyUI has another kind."""
    known = "disable_dynamic" in inspect.signature(load).parameters
    return {"disable_dynamic": True} if known else {}


def _dtype(asked: str | torch.dtype | None) -> torch.dtype | None:
    if asked in {None, "default", "target"} or isinstance(asked, torch.dtype):
        return asked if isinstance(asked, torch.dtype) else None
    found = getattr(torch, str(asked), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{asked!r} is not a dtype to compute with", hint="float16")
    return found


def _encoder_of(path: Path) -> StateDict:
    """Read one text encoder, under ComfyUI's names."""
    if not str(path).lower().endswith(".gguf"):
        state: StateDict = comfy.utils.load_torch_file(str(path), safe_load=True)
        return state
    with open_checkpoint(path) as checkpoint:
        metadata = checkpoint.metadata
        architecture = str(metadata.get("general.architecture", ""))
        names = gguf_names.encoder_names(architecture, checkpoint)
        found = _state_of(checkpoint, only=names)
        for ending, heads in gguf_names.head_counts(metadata).items():
            for name in found:
                if name.endswith(ending):
                    found[name] = _in_halves(found[name], heads)
        if gguf_names.norms_are_shifted(metadata):
            found = {
                name: weight - 1 if name.endswith("norm.weight") else weight
                for name, weight in found.items()
            }
        state = {names[name]: weight for name, weight in found.items()}
        vocabulary = model_of(metadata)
        if vocabulary is not None:
            state["spiece_model"] = torch.frombuffer(bytearray(vocabulary), dtype=torch.uint8)
    return state


def _in_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of a head's rows; a packed row is moved as it is."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise ModelError(f"{rows} rows do not make {heads} heads", hint="convert the model again")
    memory = weight.packed if isinstance(weight, QuantTensor) else weight
    moved = memory.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).contiguous()
    if not isinstance(weight, QuantTensor):
        return moved.view(weight.shape)
    return QuantTensor(moved, weight.form, tuple(weight.shape), weight.compute_dtype)


def _state_of(checkpoint: Checkpoint, only: Mapping[str, Any] | None = None) -> StateDict:
    """Return a file's tensors by name in their logical shapes: packed, or dense where small."""
    shapes = gguf_names.shapes(checkpoint, checkpoint.metadata)
    state = {}
    for name, info in checkpoint.items():
        if only is None or name in only:
            try:
                state[name] = _tensor(checkpoint, info, shapes[name])
            except DistorchError as error:
                problem = f"{checkpoint.path}: {name}: {error.problem}"
                raise type(error)(problem, hint=error.hint) from error
    return state


def _tensor(checkpoint: Checkpoint, info: TensorInfo, shape: tuple[int, ...]) -> Tensor:
    raw = _mapped(checkpoint, info.name)
    dtype = TORCH_DTYPES.get(info.dtype)
    if dtype is not None:
        return raw.clone().view(dtype).view(shape)
    weight = QuantTensor(raw, block_format(info.dtype), shape, torch.float32)
    is_small = len(shape) < 2 or math.prod(shape) < _SMALL  # noqa: PLR2004  not a matrix
    return weight.materialize() if is_small else weight


def _mapped(checkpoint: Checkpoint, name: str) -> Tensor:
    """The bytes of a tensor where the file has them; packed weights are never written to."""
    found = checkpoint.view(name)
    if not found.nbytes:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.frombuffer(found, dtype=torch.uint8)
