"""Nodes over other packs' nodes: which they are, and what a device means to each of them.

Such a node has the inputs of the one below, as they are when ComfyUI asks, and a device beside
them. It is there when the other pack is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distorch.integrations.comfyui.kits import device_input, inputs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["PACK_ROWS", "Wrapped", "device_inputs", "wrapped_inputs"]

_WAN = "multigpu/WanVideoWrapper"
_HANDED_ON = "MULTIGPUDEVICE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """A node of another pack, and the device it gets.

    ``device`` is the input's name; ``is_handed_on`` says that another node's output fills it.
    ``stands_for`` are inputs of the node below that choose a device, too, in words of their own.
    ``gives_device`` adds an output with the device's name.
    """

    base: str
    category: str = "multigpu"
    device: str = "device"
    group: str = "required"
    is_handed_on: bool = False
    waits_elsewhere: bool = False
    stands_for: tuple[str, ...] = ()
    gives_device: str = ""

    @property
    def key(self) -> str:
        """The class key that saved workflows name."""
        return f"{self.base}MultiGPU"

    @property
    def title(self) -> str:
        """What ComfyUI shows."""
        return f"{self.base} (Device)"


def _plain(base: str) -> Wrapped:
    return Wrapped(base=base, group="optional")


def _wan(base: str, device: str = "device", **more: Any) -> Wrapped:
    return Wrapped(base=base, category=_WAN, device=device, **more)


def _wan_user(base: str, device: str = "load_device") -> Wrapped:
    return _wan(base, device, is_handed_on=True)


PACK_ROWS: tuple[Wrapped, ...] = (
    _plain("LTXVLoader"),
    replace(_plain("Florence2ModelLoader"), waits_elsewhere=True),
    replace(_plain("DownloadAndLoadFlorence2Model"), waits_elsewhere=True),
    _plain("CheckpointLoaderNF4"),
    _plain("LoadFluxControlNet"),
    _plain("MMAudioModelLoader"),
    _plain("MMAudioFeatureUtilsLoader"),
    _plain("MMAudioSampler"),
    _plain("PulidModelLoader"),
    _plain("PulidInsightFaceLoader"),
    _plain("PulidEvaClipLoader"),
    _wan("WanVideoModelLoader", "compute_device", gives_device="compute_device"),
    _wan_user("WanVideoSampler", "compute_device"),
    _wan("WanVideoBlockSwap", "swap_device", group="optional"),
    _wan("LoadWanVideoT5TextEncoder", stands_for=("load_device",), gives_device="load_device"),
    _wan("LoadWanVideoClipTextEncoder", stands_for=("load_device",), gives_device="load_device"),
    replace(_wan_user("WanVideoTextEncode"), stands_for=("device",)),
    replace(_wan_user("WanVideoTextEncodeSingle"), stands_for=("device",)),
    _wan("WanVideoTextEncodeCached", "load_device", stands_for=("device",)),
    _wan("WanVideoVAELoader", "load_device", gives_device="load_device"),
    _wan("WanVideoTinyVAELoader", "load_device", gives_device="load_device"),
    _wan_user("WanVideoEncode"),
    _wan_user("WanVideoDecode"),
    _wan_user("WanVideoImageToVideoEncode"),
    _wan_user("WanVideoVACEEncode"),
    _wan_user("WanVideoClipVisionEncode"),
    _wan("WanVideoControlnetLoader"),
    _wan("WanVideoUni3C_ControlnetLoader"),
    _wan("FantasyTalkingModelLoader"),
    _wan("Wav2VecModelLoader"),
    _wan("DownloadAndLoadWav2VecModel"),
)


def device_inputs(row: Wrapped, devices: Sequence[str]) -> dict[str, Any]:
    """Return the inputs that a row adds."""
    if row.waits_elsewhere:
        return dict(inputs_of("device_offload", devices))
    if row.is_handed_on:
        tooltip = "The device that a loader, or the device selector, hands on."
        return {row.device: (_HANDED_ON, {"tooltip": tooltip})}
    if row.device == "swap_device":
        tooltip = "Where blocks wait for their turn. The pack below may know only cpu."
        return {row.device: device_input(devices, tooltip, "cpu")}
    return {row.device: device_input(devices, "The device that computes.")}


def wrapped_inputs(
    base: Mapping[str, Any], row: Wrapped, devices: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the inputs of the node below without those that the device stands for, and ours.

    >>> base = {"required": {"name": ("STRING",)}, "optional": {"load_device": (["gpu", "cpu"],)}}
    >>> row = Wrapped(base="Loader", stands_for=("load_device",))
    >>> wrapped_inputs(base, row, ["cpu"])["optional"]
    {}
    """
    inputs = {group: dict(members) for group, members in base.items()}
    ours = device_inputs(row, devices)
    for members in inputs.values():
        for name in (*row.stands_for, *ours):
            members.pop(name, None)
    inputs.setdefault("required", {})
    inputs[row.group] = inputs.get(row.group, {}) | ours
    return inputs
