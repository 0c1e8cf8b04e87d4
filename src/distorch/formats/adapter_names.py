"""Which module of a model a LoRA file means: names only."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Final

__all__ = ["Matches", "match_targets"]

_MODEL: Final = (
    r"(?:unet|prior_unet|diffusion_model|transformer(?:_\d)?|t(?:e\d?|ext_encoders?(?:_\d)?))"
)
_PART: Final = re.compile(rf"lora_{_MODEL}_|{_MODEL}\.")
"""How a name begins that says which model of a pipeline it is for."""
_WRAPPER: Final = {
    ".": re.compile(rf"base_model\.model\.|model\.|lycoris_|{_MODEL}\."),
    "_": re.compile(rf"lora_|lycoris_|model_|{_MODEL}_"),
}
"""How a name may begin, with dots or without, where the model's own name does not."""


@dataclass(frozen=True, slots=True)
class Matches:
    """``found`` maps a file's targets to modules.

    ``missing`` are targets that this model should have and has not; ``elsewhere`` are those that
    the file says are for other models of a pipeline.
    """

    found: Mapping[str, str]
    missing: tuple[str, ...]
    elsewhere: tuple[str, ...]


def match_targets(targets: Collection[str], modules: Collection[str]) -> Matches:
    """Find the modules that a file's targets name.

    Both are compared with dots as underscores, since some files keep no dots. A file may speak of
    several models: of a unet and two text encoders, of which the second has the names of the first.
    The model that fits best is taken first, and no module twice by two of them.

    >>> modules = ["", "blocks", "blocks.0", "blocks.0.to_q"]
    >>> matches = match_targets(["lora_unet_blocks_0_to_q", "lora_te_layers_3"], modules)
    >>> matches.found, matches.elsewhere
    ({'lora_unet_blocks_0_to_q': 'blocks.0.to_q'}, ('lora_te_layers_3',))
    """
    spelled = {name.replace(".", "_"): name for name in modules if name}
    parts: list[tuple[list[str], dict[str, str]]] = []
    for _, group in groupby(sorted(targets, key=_part), key=_part):
        names = list(group)
        hits = {name: module for name in names if (module := _find(name, spelled)) is not None}
        parts.append((names, hits))
    parts.sort(key=lambda part: (len(part[1]) / len(part[0]), len(part[1])), reverse=True)
    found: dict[str, str] = {}
    missing: list[str] = []
    elsewhere: list[str] = []
    for number, (part, hits) in enumerate(parts):
        if number and (not hits or set(hits.values()) & set(found.values())):
            elsewhere += part
        else:
            found |= hits
            missing += [name for name in part if name not in hits]
    return Matches(found, tuple(missing), tuple(elsewhere))


def _part(target: str) -> str:
    """The part of a pipeline that a target's name begins with."""
    found = _PART.match(target.removeprefix("base_model.model."))
    return found[0] if found else ""


def _find(target: str, spelled: Mapping[str, str]) -> str | None:
    return next((spelled[name] for name in _spellings(target) if name in spelled), None)


def _spellings(target: str) -> Iterator[str]:
    """The names that a module may have in the model, the most likely first."""
    wrapper = _WRAPPER["." if "." in target else "_"]
    while target:
        flat = target.replace(".processor.", ".").replace(".", "_")
        yield flat
        yield f"{flat}_0"  # diffusers once named to_out.0 without its number
        found = wrapper.match(target)
        if found is None:
            return
        target = target[found.end() :]
