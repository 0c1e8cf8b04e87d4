"""Plans where the weights of a described model rest on a machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from distorch.errors import AllocationError
from distorch.integrations.memories import as_seen, check_here, machine_here
from distorch.integrations.module_tree import Tree, whole
from distorch.integrations.request import Request
from distorch.machine import Machine
from distorch.plan.blocks import Block, cut
from distorch.plan.cost import with_usual_links
from distorch.plan.plan import Plan, gib
from distorch.plan.planner import check_room, make_plan
from distorch.simulate import judge_of_links

__all__ = ["Planning"]


@dataclass(frozen=True, slots=True)
class Planning:
    """A model to plan for; ``in_place`` says that its weights lie in a checkpoint's files.

    With ``spills``, what rests on disk is a copy of it all the same, which needs room.
    ``held`` are the bytes of each tier that it has while it is distributed, and can have again.
    """

    tree: Tree
    in_place: bool
    spills: bool = False
    held: Mapping[str, int] = field(default_factory=dict)

    def plan(self, request: Request, machine: Machine | None) -> Plan:
        """Return the plan that a request comes to on a machine (None: this one), as it is now.

        Raises:
            AllocationError: the request cannot be read, or does not fit the machine.
            MachineError: it names a device that is not here.
        """
        machine = as_seen(
            machine or machine_here(request.folder),
            self._homes(),
            any_tier=request.names_its_devices,
        )
        if isinstance(request.allocation, Plan):
            plan = request.allocation.for_blocks(self._blocks_on(request.allocation.compute))
            check_room(plan, self._with_less_room(machine, plan.compute))
        else:
            plan = self._by_line(request, machine, self._model_bytes)
        check_here(plan)
        return replace(plan, notes=tuple(dict.fromkeys(plan.notes + self.tree.notes)))

    def _by_line(self, request: Request, machine: Machine, model_bytes: int) -> Plan:
        line, judge = request.line(model_bytes, machine), None
        device = line.resolve(model_bytes, machine, request.compute).compute
        machine = self._with_less_room(machine, device)
        blocks = self._blocks_on(device)
        if line.mode == "auto" and device != "cpu":  # donors are dealt to by their links
            machine = with_usual_links(machine, device)
            judge = judge_of_links(blocks, machine)
        return make_plan(
            blocks,
            line,
            machine,
            compute=request.compute,
            ring_bytes=request.ring_bytes,
            judge=judge,
        )

    def _with_less_room(self, machine: Machine, compute: str) -> Machine:
        """See what the model needs beside its weights as taken."""
        tier, taken_bytes = machine.tier(compute), self.tree.beside_bytes
        if taken_bytes > tier.free_bytes:
            raise AllocationError(
                f"{gib(taken_bytes)} are to be left beside the weights on {compute}, which has "
                f"{gib(tier.free_bytes)} free",
                hint="fewer tokens",
            )
        return machine.replace_tier(replace(tier, free_bytes=tier.free_bytes - taken_bytes))

    def _blocks_on(self, compute: str) -> tuple[Block, ...]:
        """The blocks, if that device computes.

        How an accelerator's library adds up a product depends on its rows: a module's weights stay
        whole there, so that its bits stay. A loaded model computes by runs in every placement.
        """
        root = self.tree.root
        return cut(root if compute == "cpu" or self.in_place else whole(root))

    def _homes(self) -> Mapping[str, int]:
        """Bytes of the weights where they lie now, and in a checkpoint's files."""
        if self.in_place and self.spills:
            return self.held
        if self.in_place:
            return {**self.held, "disk": self._model_bytes}
        if self.held:
            return self.held
        homes: Counter[str] = Counter()
        for block in cut(self.tree.root):
            weight = self.tree.weights[block.parts[0].tensor]
            homes[str(weight.original.device)] += block.nbytes
        return homes

    @property
    def _model_bytes(self) -> int:
        return sum(block.nbytes for block in cut(self.tree.root))
