"""The new nodes: place what is loaded, plan it, and report on it."""

from __future__ import annotations

from typing import Any

from distorch.integrations.comfyui.in_comfy.devices import device_names
from distorch.integrations.comfyui.in_comfy.loaded import (
    patcher_of,
    plan_leaving_free,
    plan_of,
    request_for,
)
from distorch.integrations.comfyui.in_comfy.outputs import placed, spread
from distorch.integrations.comfyui.in_comfy.showing import (
    line_of,
    picture_of,
    report_on,
    shown_image,
    text_of,
)
from distorch.integrations.comfyui.node_texts import ANY_DEVICE, CATEGORY, NODE_TEXTS, input_types
from distorch.integrations.request import Request

__all__ = ["DISPLAY_NAMES", "NODES"]

_GIB = 1 << 30


class _Node:
    """A node of ComfyUI, whose texts stand in `node_texts` under the name of its class."""

    CATEGORY = CATEGORY
    FUNCTION = "run"
    DESCRIPTION: str
    RETURN_TYPES: tuple[str, ...]
    RETURN_NAMES: tuple[str, ...]
    OUTPUT_TOOLTIPS: tuple[str, ...]
    OUTPUT_NODE: bool

    def __init_subclass__(cls) -> None:
        text = NODE_TEXTS.get(cls.__name__)
        if text is None:
            return
        cls.DESCRIPTION = text.description
        cls.RETURN_TYPES = tuple(output.type for output in text.outputs)
        cls.RETURN_NAMES = tuple(output.name for output in text.outputs)
        cls.OUTPUT_TOOLTIPS = tuple(output.tooltip for output in text.outputs)
        cls.OUTPUT_NODE = text.is_output

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:  # noqa: N802  (ComfyUI's name)
        return input_types(NODE_TEXTS[cls.__name__], device_names())


class _Place(_Node):
    """Places an object of any kind; its only input without a widget is that object."""

    def run(
        self, allocation: str, compute: str = ANY_DEVICE, ring: str = "", **given: Any
    ) -> tuple[Any]:
        (thing,) = given.values()
        request = request_for(patcher_of(thing), allocation, compute, ring)
        return (placed(self.RETURN_TYPES[0], thing, spread(request)),)


class DistorchPlaceModel(_Place):
    """A MODEL, placed."""


class DistorchPlaceCLIP(_Place):
    """A CLIP, placed."""


class DistorchPlaceVAE(_Place):
    """A VAE, placed."""


class DistorchPlaceControlNet(_Place):
    """A CONTROL_NET, placed."""


class DistorchAuto(_Node):
    """A MODEL, placed so that memory stays free."""

    def run(
        self, model: Any, keep_free_gb: float, compute: str = ANY_DEVICE, ring: str = ""
    ) -> tuple[Any, str]:
        plan = plan_leaving_free(model, round(keep_free_gb * _GIB), compute, ring)
        return placed("MODEL", model, spread(Request(allocation=plan))), line_of(plan)


class DistorchPlan(_Node):
    """A plan as text and picture; nothing moves."""

    def run(
        self, model: Any, allocation: str, compute: str = ANY_DEVICE, ring: str = ""
    ) -> dict[str, Any]:
        patcher = patcher_of(model)
        plan = plan_of(patcher, request_for(patcher, allocation, compute, ring))
        text, picture = text_of(plan.table()), picture_of(plan)
        return {"ui": {"text": [text], "images": [shown_image(picture)]}, "result": (text, picture)}


class DistorchReport(_Node):
    """What happened since a placed model was loaded."""

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802  (ComfyUI's name)
        return float("nan")  # equal to nothing: the counters go on, so it runs each time

    def run(self, model: Any, after: Any = None) -> dict[str, Any]:
        text = text_of(report_on(patcher_of(model)))
        return {"ui": {"text": [text]}, "result": (text,)}


_CLASSES = (
    DistorchPlaceModel,
    DistorchPlaceCLIP,
    DistorchPlaceVAE,
    DistorchPlaceControlNet,
    DistorchAuto,
    DistorchPlan,
    DistorchReport,
)
NODES: dict[str, type] = {node.__name__: node for node in _CLASSES}
"""The nodes by their class keys."""
DISPLAY_NAMES: dict[str, str] = {key: text.title for key, text in NODE_TEXTS.items()}
"""What ComfyUI shows for them."""
