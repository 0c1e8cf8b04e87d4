"""Computes sampled layers again with dense weights in memory, and compares every bit.

The weights are decoded by gguf's own code, so that nothing of the streamed run is used again.

usage: resident.py MODEL SAMPLES
"""

from __future__ import annotations

import json
import sys

import gguf
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from distorch import open_checkpoint
from distorch.formats import TensorInfo
from distorch.integrations.diffusers.configs import CONFIGS
from distorch.integrations.diffusers.layouts import layout_of, renamed


def dense(info: TensorInfo) -> Tensor:
    """Read a tensor and decode it whole."""
    stored = np.fromfile(info.path, np.uint8, info.nbytes, offset=info.offset)
    kind = gguf.GGMLQuantizationType[info.dtype]
    values = gguf.quants.dequantize(stored.reshape(*info.shape[:-1], -1), kind)
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(info.shape)


def layer(infos: dict[str, TensorInfo], index: int) -> nn.Module:
    """Build one layer of the model as its class does, with all of its weights."""
    config = CONFIGS["WanTransformer3DModel"]({name: it.shape for name, it in infos.items()})
    with torch.device("meta"):
        alone: nn.Module = WanTransformer3DModel.from_config(config | {"num_layers": 1}).blocks[0]
    prefix = f"blocks.{index}."
    weights = {
        name.removeprefix(prefix): dense(info)
        for name, info in infos.items()
        if name.startswith(prefix)
    }
    alone.load_state_dict(weights, assign=True)
    return alone.eval()


def main() -> None:
    """Compare each sampled layer."""
    path, samples = sys.argv[1:]
    kept = load_file(samples)
    with open_checkpoint(path) as checkpoint:
        layout = layout_of(checkpoint)
        assert layout is not None, "a Wan is known by its tensors"
        infos = renamed(layout, checkpoint, {}).infos
    same = {}
    for index in sorted({int(name.split(".")[0]) for name in kept}):
        given = {
            name.split(".")[1]: value
            for name, value in kept.items()
            if name.startswith(f"{index}.")
        }
        with torch.inference_mode():
            rotary = given["cos"], given["sin"]
            out = layer(infos, index)(given["hidden"], given["text"], given["time"], rotary)
        same[index] = bool(torch.equal(out, given["out"]))
    print(json.dumps(same))


if __name__ == "__main__":
    main()
