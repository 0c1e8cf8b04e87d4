"""What a LoRA file holds, from the names and shapes of its tensors: no weight is read here.

Four dialects name the same things. X is the module that a tensor changes:

    peft        base_model.model.X.lora_A.weight   and adapter_config.json beside the file
    diffusers   transformer.X.lora_A.weight        older: X.lora.down.weight, X_lora.down.weight
    Kohya       lora_unet_X.lora_down.weight       the dots of X are underscores; X.alpha
    ComfyUI     diffusion_model.X.lora_down.weight and X.diff, X.diff_b: whole differences

LoHa and LoKr files have the names of LyCORIS (``hada_w1_a``, ``lokr_w1``, ...) after X, in each
dialect; so has DoRA's magnitude. The file is the work of a stranger: what does not add up is an
error that names it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from distorch.errors import FormatError

__all__ = ["AdapterFile", "AdapterSpec", "Kind", "describe_adapters", "read_config"]

Kind = Literal["lora", "loha", "lokr", "difference"]

_NAMED = r"(?:\.\w+)?"  # a state dict that was saved as it is has the adapter's name here
_ROLES: Final = tuple(
    (re.compile(f"(.+?){pattern}"), role)
    for pattern, role in (
        (rf"(?:\.lora_A{_NAMED}|[._]lora[._]down|\.lora_linear_layer\.down)\.weight", "down"),
        (rf"(?:\.lora_B{_NAMED}|[._]lora[._]up|\.lora_linear_layer\.up)\.weight", "up"),
        (rf"\.lora_B{_NAMED}\.bias", "up_bias"),
        (r"\.lora_mid\.weight", "mid"),
        (rf"\.lora_embedding_A{_NAMED}", "embedding_down"),
        (rf"\.lora_embedding_B{_NAMED}", "embedding_up"),
        (rf"\.lora_magnitude_vector{_NAMED}(?:\.weight)?", "magnitude"),
        (r"\.dora_scale", "dora_scale"),
        *(
            (rf"\.hada_{part}{_NAMED}", f"hada_{part}")
            for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
        ),
        *(
            (rf"\.lokr_{part}{_NAMED}", f"lokr_{part}")
            for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        ),
        (r"\.diff", "weight"),
        (r"\.diff_b", "bias"),
        (r"\.alpha", "alpha"),
    )
)
_LORA: Final = ("down", "up", "up_bias", "mid", "embedding_down", "embedding_up")
_WHOLE: Final[Mapping[Kind, tuple[frozenset[str], ...]]] = {
    "lora": (frozenset({"down", "up"}), frozenset({"embedding_down", "embedding_up"})),
    "loha": (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    "lokr": tuple(
        frozenset(first | second)
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
    ),
    "difference": (frozenset({"weight"}), frozenset({"bias"})),
}
"""For each kind, the roles of which one set has to be there whole."""
_RANKED: Final = ("down", "embedding_down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Roles whose first dimension is the rank; the first that is there says it."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What a file adds to one module.

    ``target`` is the module as the file names it, ``tensors`` maps a role to a tensor's name,
    ``scale`` is what the sum is multiplied by before any strength: alpha / rank.
    """

    target: str
    kind: Kind
    tensors: Mapping[str, str]
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """All that a file adds; ``unknown`` are tensors that nobody here understands.

    ``guessed`` says that a peft file's scale is a guess: its configuration is not there.
    """

    specs: tuple[AdapterSpec, ...]
    unknown: tuple[str, ...]
    guessed: bool = False


def describe_adapters(
    shapes: Mapping[str, Sequence[int]],
    number: Callable[[str], float],
    config: Mapping[str, object] | None = None,
) -> AdapterFile:
    """Sort a file's tensors by what they change; ``number`` reads one that is a single number.

    ``config`` is what peft or diffusers wrote beside the tensors. A file without one has an alpha
    for each target; where that is missing too, alpha is the rank, as all readers of such files
    have it.

    Raises:
        FormatError: it is no LoRA, parts are missing, or a rank is 0.

    >>> shapes = {"unet.mid.lora_A.weight": (4, 64), "unet.mid.lora_B.weight": (32, 4)}
    >>> (spec,) = describe_adapters(shapes, float).specs
    >>> spec.target, spec.kind, sorted(spec.tensors), spec.scale
    ('unet.mid', 'lora', ['down', 'up'], 1.0)
    """
    if not shapes:
        raise FormatError("it holds no tensors", hint="a file with the weights of a LoRA")
    targets, unknown = _by_target(shapes)
    specs = [
        spec
        for target, roles in targets.items()
        for spec in _specs(target, roles, shapes, number, config or {})
    ]
    if not specs:
        raise FormatError(
            f"it is not a LoRA: its {len(shapes)} tensors have names like {next(iter(shapes))!r}",
            hint="names that end in .lora_A.weight, .lora_down.weight, .hada_w1_a or .lokr_w1",
        )
    guessed = not config and any(each.startswith("base_model.model.") for each in targets)
    return AdapterFile(tuple(specs), tuple(unknown), guessed)


def read_config(path: Path, metadata: Mapping[str, object]) -> Mapping[str, object]:
    """Return what peft or diffusers wrote of a LoRA: beside the file, or into its header.

    Raises:
        FormatError: it is there and cannot be read.
    """
    beside = path.parent / "adapter_config.json"
    text = metadata.get("lora_adapter_metadata")
    source = f"'lora_adapter_metadata' in {path}"
    try:
        if not isinstance(text, str) and beside.is_file():
            source, text = str(beside), beside.read_text(encoding="utf-8")
        config = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source} is not JSON: {error}", hint="save the LoRA again") from error
    if not isinstance(config, dict):
        raise FormatError(f"{source} is not a JSON object", hint="save the LoRA again")
    return config


def _by_target(names: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Each target's tensors by role, and the names that nobody here understands."""
    targets: dict[str, dict[str, str]] = {}
    unknown = []
    for name in names:
        found = next(((m[1], role) for p, role in _ROLES if (m := p.fullmatch(name))), None)
        if found is None:
            unknown.append(name)
            continue
        target, role = found
        if role in targets.setdefault(target, {}):
            other = targets[target][role]
            raise FormatError(f"{other!r} and {name!r} say the same of one module: two LoRAs")
        targets[target][role] = name
    return targets, unknown


def _specs(
    target: str,
    roles: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    number: Callable[[str], float],
    config: Mapping[str, object],
) -> list[AdapterSpec]:
    """What is added to one module, of each kind that is there."""
    kinds: dict[Kind, dict[str, str]] = {"lora": {}, "loha": {}, "lokr": {}, "difference": {}}
    for role, name in roles.items():
        kind = _kind_of(role)
        if kind is not None:
            kinds[kind][role] = name
    low_rank = [kind for kind in ("lora", "loha", "lokr") if kinds[kind]]
    norms = {role: name for role, name in roles.items() if role in {"magnitude", "dora_scale"}}
    if len(low_rank) > 1 or (not low_rank and (norms or not kinds["difference"])):
        raise FormatError(f"{target!r} has {sorted(roles)}: of no kind of LoRA, or of several")
    found = []
    for kind, tensors in kinds.items():
        if not tensors:
            continue
        _check_whole(target, kind, tensors)
        if kind == "difference":
            found.append(AdapterSpec(target, kind, tensors, 1.0))
            continue
        rank = _rank(target, tensors, shapes)
        alpha = number(roles["alpha"]) if "alpha" in roles else None
        scale = _scale(alpha, rank, _config_of(target, config), target)
        found.append(AdapterSpec(target, kind, {**tensors, **norms}, scale))
    return found


def _kind_of(role: str) -> Kind | None:
    if role in _LORA:
        return "lora"
    if role.startswith("hada_"):
        return "loha"
    if role.startswith("lokr_"):
        return "lokr"
    return "difference" if role in {"weight", "bias"} else None


def _check_whole(target: str, kind: Kind, tensors: Mapping[str, str]) -> None:
    wanted = _WHOLE[kind]
    if any(whole <= tensors.keys() for whole in wanted):
        return
    missing = min((whole - tensors.keys() for whole in wanted), key=len)
    raise FormatError(
        f"{target!r} has {', '.join(sorted(tensors))} without {', '.join(sorted(missing))}",
        hint="download the LoRA again: a part of it is missing",
    )


def _rank(
    target: str, tensors: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> int | None:
    """The rank of what is added; none of a LoKr whose factors are both whole."""
    name = next((tensors[role] for role in _RANKED if role in tensors), None)
    if name is None:
        return None
    shape = tuple(shapes[name])
    if not shape or not shape[0]:
        raise FormatError(
            f"the LoRA of {target!r} has rank 0: {name} has the shape {shape}",
            hint="save it again, with all of its weights gathered on one device",
        )
    return shape[0]


def _config_of(target: str, config: Mapping[str, object]) -> Mapping[str, object]:
    """The configuration that speaks of a target; diffusers prefixes one for each model."""
    parts = {key.rpartition(".")[0] for key in config}
    part = next((each for each in parts if each and target.startswith(f"{each}.")), "")
    prefix = f"{part}." if part else ""
    return {
        key.removeprefix(prefix): value
        for key, value in config.items()
        if key.rpartition(".")[0] == part
    }


def _scale(
    alpha: float | None, rank: int | None, config: Mapping[str, object], target: str
) -> float:
    """Return alpha / rank, or its rank-stabilised kin (https://arxiv.org/abs/2312.03732)."""
    if alpha is not None:
        return alpha / rank if rank else 1.0  # LyCORIS scales no LoKr whose factors are whole
    default = config.get("lora_alpha", config.get("alpha"))
    alpha = _number(_patterned(config, "alpha_pattern", target, default), "lora_alpha")
    said = _number(_patterned(config, "rank_pattern", target, config.get("r")), "r")
    divisor = rank or said
    if alpha is None or divisor is None:
        return 1.0
    return alpha / (math.sqrt(divisor) if config.get("use_rslora") else divisor)


def _patterned(config: Mapping[str, object], key: str, target: str, default: object) -> object:
    """What a configuration says of one target: peft's patterns are ends of names, or whole ones."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise FormatError(f"{key!r} of the LoRA's configuration is not a table")
    for pattern, value in patterns.items():
        name = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.\-]+", name):  # a stranger's expression could run for ever
            raise FormatError(
                f"{key!r} has {pattern!r}: an expression, where names are read",
                hint="name the modules one by one in adapter_config.json",
            )
        if f".{target}".endswith(f".{name}"):
            return value
    return default


def _number(value: object, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        raise FormatError(f"{name!r} of the LoRA's configuration is {value!r}, not a number")
    return value
