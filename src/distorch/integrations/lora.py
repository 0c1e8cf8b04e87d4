"""LoRAs on a distributed module: found modules, hooks beside its own, weights that are placed too.

No weight of the module is touched. A hook on each module that a file names adds what the file's
adapters make of the same input. The adapters' own weights are distributed as any module's are, and
their steps are the module's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distorch.allocation import Allocation
from distorch.errors import AllocationError, ModelError
from distorch.formats.adapter_file import AdapterSpec
from distorch.formats.adapter_names import match_targets
from distorch.integrations.lora_source import LoraSource, OpenedLora, open_lora, some
from distorch.machine import Machine
from distorch.plan.plan import Plan
from distorch.quant.adapters import Adapter, Difference, LoHa, LoKr, LoRA
from distorch.run.stats import Stats

__all__ = ["Lora", "Loras", "Placed"]

_KINDS: Mapping[str, type[Adapter]] = {
    "lora": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "difference": Difference,
}


class Placed(Protocol):
    """What `distribute` gives: adapters at rest, and the way to another place."""

    plan: Plan

    def stats(self) -> Stats:
        """The counters of the adapters' own weights."""

    def rebudget(self, allocation: str, *, machine: Machine | None) -> None:
        """Move them."""

    def discard(self) -> None:
        """Let go of them."""


class Host(Protocol):
    """The handle of the module that LoRAs are added to."""

    plan: Plan

    def place(self, adapters: nn.Module, allocation: str | Allocation) -> Placed:
        """Distribute adapters, whose steps are the module's."""


class Lora:
    """One LoRA: ``targets`` are the modules it changes, ``plan`` says where its own weights rest.

    ``elsewhere`` are names in its file that are for other models of a pipeline.
    """

    def __init__(
        self,
        name: str,
        targets: tuple[str, ...],
        elsewhere: tuple[str, ...],
        strength: float,
        placed: Placed,
        remove: Callable[[Lora], None],
    ) -> None:
        self.name, self.targets, self.elsewhere = name, targets, elsewhere
        self._placed: Placed | None = placed
        self._remove = remove
        self._strength = strength

    @property
    def strength(self) -> float:
        """What its change is multiplied by, from the next step on; 0 turns it off."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = _checked(value)

    @property
    def placed(self) -> Placed:
        """Its own weights, distributed.

        Raises:
            ModelError: it was removed.
        """
        if self._placed is None:
            raise ModelError(f"the LoRA {self.name!r} was removed", hint="handle.add_lora(path)")
        return self._placed

    @property
    def plan(self) -> Plan:
        """Where its own weights rest."""
        return self.placed.plan

    def stats(self) -> Stats:
        """Return the counters of its own weights."""
        return self.placed.stats()

    def remove(self) -> None:
        """Take it off; a second time does nothing."""
        if self._placed is not None:
            self._remove(self)
            self._placed = None

    def __repr__(self) -> str:
        return f"<Lora {self.name!r} x {self.strength:g} on {len(self.targets)} modules>"


class Loras(Mapping[str, Lora]):
    """The LoRAs of a distributed module by name, in the order in which they were added."""

    def __init__(self, module: nn.Module, host: Host) -> None:
        self._module, self._host = module, host
        self._loras: dict[str, Lora] = {}
        self._lines: dict[str, str | Allocation | None] = {}
        self._hooks: dict[str, _Hook] = {}

    def add(
        self,
        source: LoraSource,
        strength: float,
        *,
        name: str | None,
        allocation: str | Allocation | None,
        strict: bool,
    ) -> Lora:
        """Read, match, place, and put on; after an error nothing has changed.

        Raises:
            ModelError: the LoRA is for another model, or its name is taken.
            FormatError: the file is no LoRA.
            AllocationError: its own weights do not fit.
        """
        strength = _checked(strength)
        opened = open_lora(source)
        name = self._free_name(name, opened.name)
        places, elsewhere = self._match(opened, strict=strict)
        specs = [spec for spec in opened.found.specs if spec.target in places]
        modules = [places[spec.target] for spec in specs]
        adapters = [
            self._build(spec, module, opened.tensors)
            for spec, module in zip(specs, modules, strict=True)
        ]
        placed = self._place(nn.ModuleList(adapters), allocation)
        targets = tuple(dict.fromkeys(modules))
        lora = Lora(name, targets, elsewhere, strength, placed, self._take_off)
        for module, adapter in zip(modules, adapters, strict=True):
            if module not in self._hooks:
                self._hooks[module] = _Hook(self._module.get_submodule(module))
            self._hooks[module].adapters.append((lora, adapter))
        self._loras[name], self._lines[name] = lora, allocation
        return lora

    def clear(self) -> None:
        """Take all of them off."""
        for lora in list(self._loras.values()):
            lora.remove()

    def follow(self, machine: Machine | None) -> None:
        """Rest them by the module's new plan; those with a line of their own stay, if they can."""
        plan = self._host.plan
        for name, lora in self._loras.items():
            stays = self._lines[name] is not None and lora.plan.compute == plan.compute
            if not stays:
                lora.placed.rebudget(_like(plan), machine=machine)

    def _place(self, adapters: nn.Module, allocation: str | Allocation | None) -> Placed:
        plan = self._host.plan
        placed = self._host.place(adapters, _like(plan) if allocation is None else allocation)
        computes = placed.plan.compute
        if computes != plan.compute:
            placed.discard()
            raise AllocationError(
                f"the LoRA would compute on {computes}, the model on {plan.compute}",
                hint=f"allocation={_like(plan)!r}",
            )
        return placed

    def _match(
        self, opened: OpenedLora, *, strict: bool
    ) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Find the modules that are meant; say what is not understood."""
        source, modules = opened.name, dict(self._module.named_modules())
        targets = list(dict.fromkeys(spec.target for spec in opened.found.specs))
        matches = match_targets(targets, modules.keys())
        if not matches.found:
            raise ModelError(
                f"{source} is a LoRA for another model: none of the {len(targets)} modules that it "
                f"names is in this {type(self._module).__name__}: {some(targets)}",
                hint="names of another codebase are converted by diffusers' load_lora_weights, "
                "which works on a distributed model too",
            )
        for name in matches.found.values():
            if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
                raise ModelError(
                    f"{source} has a LoRA for {name}, whose forward torch's MultiheadAttention "
                    "never calls: nothing can be added there",
                    hint="merge it into the weights before the model is distributed",
                )
        lost = (*matches.missing, *opened.found.unknown)
        if lost:
            problem = (
                f"{source}: of the {len(targets)} modules that it names, {len(matches.found)} were "
                f"found; {len(lost)} names mean nothing here: {some(lost)}"
            )
            if strict:
                raise ModelError(problem, hint="strict=False leaves them out")
            warnings.warn(problem, stacklevel=4)
        if opened.found.guessed:
            problem = f"{source}: no adapter_config.json is beside it; alpha is taken as the rank"
            warnings.warn(problem, stacklevel=4)
        return matches.found, matches.elsewhere

    def _build(self, spec: AdapterSpec, name: str, tensors: Mapping[str, Tensor]) -> Adapter:
        base = self._module.get_submodule(name)
        parts = {role: tensors[key] for role, key in spec.tensors.items()}
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                return _KINDS[spec.kind](base, parts, spec.scale)
        except ModelError as error:
            raise ModelError(f"{name}: {error.problem}", hint=error.hint) from error

    def _take_off(self, lora: Lora) -> None:
        del self._loras[lora.name], self._lines[lora.name]
        for name in lora.targets:
            hook = self._hooks[name]
            hook.adapters = [entry for entry in hook.adapters if entry[0] is not lora]
            if not hook.adapters:
                hook.handle.remove()
                del self._hooks[name]
        lora.placed.discard()

    def _free_name(self, wanted: str | None, source: str) -> str:
        if wanted is not None and wanted in self._loras:
            raise ModelError(
                f"a LoRA named {wanted!r} is there already",
                hint="another name, or handle.loras[name].remove() first",
            )
        stem = Path(source).stem
        names = (stem if not number else f"{stem}-{number + 1}" for number in range(len(self) + 1))
        return wanted or next(name for name in names if name not in self._loras)

    def __getitem__(self, name: str) -> Lora:
        return self._loras[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loras)

    def __len__(self) -> int:
        return len(self._loras)


class _Hook:
    """The hook on one module: its adapters add one after another, in the order of their LoRAs."""

    def __init__(self, module: nn.Module) -> None:
        self.adapters: list[tuple[Lora, Adapter]] = []
        # before the hook that takes the module's own weights away: DoRA looks at its bias
        self.handle = module.register_forward_hook(self, prepend=True, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        given = args[0] if args else next(iter(kwargs.values()))
        for lora, adapter in self.adapters:
            if lora.strength:
                output = adapter(module, given, output, lora.strength)
        return output


def _like(plan: Plan) -> str:
    """A line for the memories of a plan, in its proportions."""
    total = sum(plan.bytes_by_tier.values())
    if not total:
        return f"{plan.compute},*"
    shares = {tier: 100 * nbytes / total for tier, nbytes in plan.bytes_by_tier.items()}
    return ";".join(f"{tier},{share:.6f}%" for tier, share in shares.items())


def _checked(strength: float) -> float:
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ModelError(f"the strength {strength!r} is not a finite number", hint="strength=0.8")
    return float(strength)
