"""What the new nodes are called and what they take: names, inputs, tooltips. Pure.

ComfyUI shows all of it; `in_comfy/new_nodes.py` has what the nodes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ANY_DEVICE", "CATEGORY", "NODE_TEXTS", "Input", "NodeText", "Output", "input_types"]

CATEGORY = "DisTorch"
ANY_DEVICE = "auto"
"""The choice of a device that leaves it to the allocation."""

_OBJECTS = "MODEL,CLIP,VAE,CONTROL_NET"


class _Anything(str):
    """The type ``*``. ComfyUI asks whether types differ; older versions ask just that."""

    __slots__ = ()

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a node: ``type`` as ComfyUI names it, or ``DEVICE`` for a choice of devices."""

    name: str
    type: str
    tooltip: str
    options: dict[str, Any] = field(default_factory=dict)
    is_required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output of a node."""

    name: str
    type: str
    tooltip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeText:
    """What ComfyUI shows of a node."""

    title: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    is_output: bool = False


def input_types(node: NodeText, devices: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Write a node's inputs as ComfyUI reads them, with the devices that can be chosen.

    >>> made = input_types(NODE_TEXTS["DistorchPlaceVAE"], ["cuda:0", "cpu"])
    >>> list(made["required"]), made["optional"]["compute"][0]
    (['vae', 'allocation'], ['auto', 'cuda:0', 'cpu'])
    """
    made: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for given in node.inputs:
        options = {**given.options, "tooltip": given.tooltip}
        kind: Any = [ANY_DEVICE, *devices] if given.type == "DEVICE" else given.type
        if given.type == "DEVICE":
            options["default"] = ANY_DEVICE
        made["required" if given.is_required else "optional"][given.name] = (kind, options)
    return made


_ALLOCATION = Input(
    name="allocation",
    type="STRING",
    tooltip=(
        "Which memory holds how much of the weights. The first device computes; the others lend. "
        "cuda:0,4gb;cpu,* rests 4 GiB on the card and streams the rest from RAM; "
        "cuda:0,30%;cuda:1,50%;cpu,* has two lenders; disk is one too. "
        "auto: decided from what is free."
    ),
    options={"default": "auto"},
)
_COMPUTE = Input(
    name="compute",
    type="DEVICE",
    tooltip=(
        "The device that computes. auto: the first device of the allocation; for an allocation of "
        "auto, the one that ComfyUI uses."
    ),
    is_required=False,
)
_RING = Input(
    name="ring",
    type="STRING",
    tooltip=(
        "How much of the compute device's memory the weights on their way may take, such as 200mb. "
        "Empty: as much as hides the transfer."
    ),
    options={"default": ""},
    is_required=False,
)


def _place(kind: str, name: str, thing: str, more: str = "") -> NodeText:
    """A node that places one kind of object."""
    return NodeText(
        title=f"Place {thing} (DisTorch)",
        description=(
            f"Spreads the weights of a {thing} that is already loaded over several memories. "
            "The file is not loaded again, and results are the same, bit for bit." + more
        ),
        inputs=(
            Input(name=name, type=kind, tooltip=f"The {thing} to place, from any loader."),
            _ALLOCATION,
            _COMPUTE,
            _RING,
        ),
        outputs=(
            Output(name=kind, type=kind, tooltip=f"The same {thing}, placed when it is used."),
        ),
    )


_AUTO = NodeText(
    title="Place Model, Keep Memory Free (DisTorch)",
    description=(
        "Keeps as much of a model on the compute device as leaves the given memory free, and "
        "spreads the rest where it arrives fastest: other cards, RAM, disk."
    ),
    inputs=(
        Input(name="model", type="MODEL", tooltip="The model to place, from any loader."),
        Input(
            name="keep_free_gb",
            type="FLOAT",
            tooltip=(
                "GiB of the compute device that stay free of weights: for activations, other "
                "models and other programs. More for larger pictures and longer videos."
            ),
            options={"default": 3.0, "min": 0.0, "max": 1024.0, "step": 0.1},
        ),
        _COMPUTE,
        _RING,
    ),
    outputs=(
        Output(name="MODEL", type="MODEL", tooltip="The same model, placed when it is used."),
        Output(name="allocation", type="STRING", tooltip="What was decided, as a line."),
    ),
)

_PLAN = NodeText(
    title="Preview Plan (DisTorch)",
    description=(
        "Shows where an allocation would put the weights, as a table and a picture. Nothing moves."
    ),
    inputs=(
        Input(
            name="model",
            type=_OBJECTS,
            tooltip="The model, CLIP, VAE or ControlNet to plan for. It stays as it is.",
        ),
        _ALLOCATION,
        _COMPUTE,
        _RING,
    ),
    outputs=(
        Output(name="plan", type="STRING", tooltip="The plan as a table."),
        Output(name="picture", type="IMAGE", tooltip="A bar of the weights for each device."),
    ),
    is_output=True,
)

_REPORT = NodeText(
    title="Memory and Stall Report (DisTorch)",
    description=(
        "Says what happened since a placed model was loaded: bytes at rest on each device, bytes "
        "streamed, and how long computing stood still for them."
    ),
    inputs=(
        Input(
            name="model",
            type=_OBJECTS,
            tooltip="The placed model, CLIP, VAE or ControlNet to report on.",
        ),
        Input(
            name="after",
            type=_Anything("*"),
            tooltip="An output of the node to wait for, such as the sampler's LATENT.",
            is_required=False,
        ),
    ),
    outputs=(Output(name="report", type="STRING", tooltip="The report as a table."),),
    is_output=True,
)

NODE_TEXTS: dict[str, NodeText] = {
    "DistorchPlaceModel": _place(
        "MODEL", "model", "Model", " LoRA loaders may come before this node or after it."
    ),
    "DistorchPlaceCLIP": _place("CLIP", "clip", "CLIP"),
    "DistorchPlaceVAE": _place("VAE", "vae", "VAE"),
    "DistorchPlaceControlNet": _place(
        "CONTROL_NET", "control_net", "ControlNet", " It must compute where its model does."
    ),
    "DistorchAuto": _AUTO,
    "DistorchPlan": _PLAN,
    "DistorchReport": _REPORT,
}
"""The new nodes by their class keys."""
