"""A small network in several forms, LoRAs for it, and how it is run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import distorch
from distorch.integrations.attach import Handle
from distorch.quant.tensor import QuantTensor
from tests.integrations.test_packed_modules import Net as PackedNet
from tests.plan_strategies import roomy

MACHINE = roomy("cpu", "disk")
LINES = ["cpu,*", "cpu,0b;disk,*", "cpu,50%;disk,50%"]
WIDTH, RANK = 256, 8
IDS = torch.arange(12).view(2, 6)


class Net(PackedNet):
    """The network of the packed modules, not packed, of random weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        super().__init__("Q8_0")
        for module in self.modules():
            weight = module._parameters.get("weight")
            if isinstance(weight, QuantTensor):
                module.weight = nn.Parameter(weight.materialize(), requires_grad=False)
        self.head.weight = self.embed.weight
        self.to(dtype)


def made(form: str) -> nn.Module:
    """The network in a form: the same each time."""
    if form in {"float32", "bfloat16"}:
        return Net(getattr(torch, form))
    torch.manual_seed(0)
    return PackedNet(form)


def first(*, rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A LoRA of every module that takes one."""
    sizes = {"conv": ((WIDTH, 3), WIDTH), "head": ((WIDTH,), 64)}
    sizes |= {f"layers.{number}": ((WIDTH,), WIDTH) for number in range(3)}
    random = torch.Generator().manual_seed(1)
    tensors = {
        "embed.lora_embedding_A": torch.randn(rank, 64, generator=random),
        "embed.lora_embedding_B": torch.randn(WIDTH, rank, generator=random),
    }
    for name, (inputs, outputs) in sizes.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *inputs, generator=random)
        one = (1,) * (len(inputs) - 1)
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, *one, generator=random)
    return {name: (0.05 * tensor).to(dtype) for name, tensor in tensors.items()}


def second() -> dict[str, Tensor]:
    """One of each other kind."""
    random = torch.Generator().manual_seed(2)

    def weight(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=random)

    return {
        "layers.0.lora_A.weight": weight(RANK, WIDTH),
        "layers.0.lora_B.weight": weight(WIDTH, RANK),
        "layers.0.lora_magnitude_vector": 1.5 + weight(WIDTH),
        "layers.1.lokr_w1": weight(16, 16),
        "layers.1.lokr_w2_a": weight(16, 2),
        "layers.1.lokr_w2_b": weight(2, 16),
        "layers.1.alpha": torch.tensor(1.0),
        "layers.2.hada_w1_a": weight(WIDTH, 2),
        "layers.2.hada_w1_b": weight(2, WIDTH),
        "layers.2.hada_w2_a": weight(WIDTH, 2),
        "layers.2.hada_w2_b": weight(2, WIDTH),
        "layers.2.diff_b": weight(WIDTH),
        "conv.diff_b": weight(WIDTH),
    }


def distributed(module: nn.Module, line: str) -> Handle:
    return distorch.distribute(module, line, machine=MACHINE)


def run(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        result = module(IDS)
    assert isinstance(result, Tensor)
    return result
