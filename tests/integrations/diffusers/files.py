"""Tiny models as files: in every layout and every form that people download."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import libgguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distorch.formats import open_checkpoint
from distorch.integrations.diffusers import models
from distorch.integrations.huggingface.skeleton import Built
from tests.integrations.diffusers.originals import TINY, WIDTH, State, state_of, to_original

FORMS = ("bf16", "fp8", "fp8 scaled", "Q8_0", "Q4_K")
PREFIX = "model.diffusion_model."
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class File:
    """A tiny model in a form, as its authors lay it out or as diffusers does, perhaps prefixed."""

    name: str
    form: str
    layout: str = "authors"
    prefix: str = ""
    seed: int = 0

    @property
    def compute(self) -> torch.dtype:
        """Packed models compute in single precision on a CPU."""
        return torch.float32 if self.form.startswith("Q") else torch.bfloat16

    def __str__(self) -> str:
        return f"{self.name}, {self.form}, {self.layout}{', prefixed' if self.prefix else ''}"

    def tensors(self) -> State:
        """Its tensors as they are stored; packed rows are bytes."""
        state = stored_of(self.name, self.form, self.seed)
        if self.layout == "authors":
            state = to_original(TINY[self.name].layout, state)
        return {self.prefix + key: value for key, value in state.items()}

    def write(self, folder: Path, *, config: bool = False) -> Path:
        """Write it, with its configuration if asked, and return the file."""
        folder.mkdir(parents=True, exist_ok=True)
        if config:
            write_config(folder, self.name)
        if self.form.startswith("Q"):
            path = folder / "model.gguf"
            write_gguf(path, TINY[self.name].gguf_name, self.tensors(), self.form)
        else:
            path = folder / "model.safetensors"
            save_file({key: value.contiguous() for key, value in self.tensors().items()}, path)
        return path

    def values(self) -> State:
        """What its tensors stand for, in single precision, by diffusers' names."""
        return values_of(self.name, self.form, self.seed)


@cache
def stored_of(name: str, form: str, seed: int = 0) -> State:
    """The tensors of a model as a form keeps them, by diffusers' names."""
    keep = packed if form.startswith("Q") else stored
    state = state_of(name, seed).items()
    return {kept: value for key, each in state for kept, value in keep(key, each, form).items()}


@cache
def values_of(name: str, form: str, seed: int = 0) -> State:
    kept = stored_of(name, form, seed)
    found = {}
    for key, tensor in state_of(name, seed).items():
        if kept[key].dtype == torch.uint8:
            dense = gguf.quants.dequantize(kept[key].numpy(), gguf.GGMLQuantizationType[form])
            found[key] = torch.from_numpy(dense).view(tensor.shape)
        else:
            found[key] = kept[key].float()
        if f"{key}_scale" in kept:
            found[key] = found[key] * kept[f"{key}_scale"]
    return found


def stored(key: str, tensor: Tensor, form: str) -> State:
    """A tensor as safetensors files of a form keep it; one scale for each row, where there are."""
    if form == "f32":
        return {key: tensor}
    if form == "bf16" or tensor.dim() < 2:
        return {key: tensor.bfloat16()}
    if form == "fp8" or not _is_matrix(key, tensor):
        return {key: tensor.to(_FP8)}
    scale = tensor.abs().amax(1, keepdim=True) / 448
    return {key: (tensor / scale).to(_FP8), f"{key}_scale": scale}


def packed(key: str, tensor: Tensor, form: str) -> State:
    """A tensor as a GGUF keeps it: matrices of whole blocks are packed."""
    if tensor.dim() == 1:
        return {key: tensor}
    if not _is_matrix(key, tensor) or tensor.shape[1] % WIDTH:
        return {key: tensor.half()}
    quantise = libgguf.quantize_rows if form.endswith("K") else gguf.quants.quantize
    return {key: torch.from_numpy(quantise(tensor.numpy(), gguf.GGMLQuantizationType[form]))}


def _is_matrix(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.dim() == 2


def write_gguf(path: Path, architecture: str, tensors: State, form: str) -> None:
    kinds = {torch.uint8: form, torch.float16: "F16", torch.float32: "F32"}
    writer = gguf.GGUFWriter(path, architecture)
    for key, tensor in tensors.items():
        data = tensor.numpy()
        while data.ndim > 1 and data.shape[0] == 1:
            data = data[0]  # as ggml writes them
        writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType[kinds[tensor.dtype]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(folder: Path, name: str) -> None:
    config = {"_class_name": TINY[name].class_name, **TINY[name].config}
    (folder / "config.json").write_text(json.dumps(config))


def build(path: Path, dtype: torch.dtype = torch.float32) -> Built:
    with open_checkpoint(path) as checkpoint:
        return models.build(checkpoint, dtype)


def read(built: Built) -> State:
    """The values of a built model's weights, decoded here once more."""
    found = {}
    for name, info in built.infos.items():
        with info.path.open("rb") as file:
            file.seek(info.offset)
            raw = bytearray(file.read(info.nbytes))
        if name in built.amend:
            built.amend[name](memoryview(raw))
        kind = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16, "F8_E4M3": _FP8}
        if info.dtype in kind:
            value = torch.frombuffer(raw, dtype=kind[info.dtype]).float().view(info.shape)
        else:
            rows = np.frombuffer(raw, np.uint8).reshape(info.shape[0], -1)
            dense = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[info.dtype])
            value = torch.from_numpy(dense)
        if name in built.scales:
            value = built.scales[name].multiply(value.clone())
        found[name] = value
    return found
