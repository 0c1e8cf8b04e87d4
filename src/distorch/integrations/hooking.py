"""What stands between a module and an executor: hooks, and where the module finds its weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from distorch.integrations.bracket import Bracket, Place, mark_steps
from distorch.integrations.module_tree import Tree, Weight, as_parameter
from distorch.integrations.resting import RestingWeight, Run
from distorch.plan.plan import Plan
from distorch.run.executor import Executor

__all__ = ["Attachment", "runs_of"]


class Attachment:
    """Points a module at its weights: those that rest on its device for good, others by hooks.

    Weights in ``kept`` stay in the module's own tensors. ``steps_of`` is the module whose passes
    are the steps.
    """

    def __init__(
        self,
        module: nn.Module,
        tree: Tree,
        executor: Executor,
        *,
        kept: Collection[str] = (),
        steps_of: nn.Module,
    ) -> None:
        self._tree = tree
        self._executor = executor
        self._resting: dict[str, RestingWeight] = {}
        plan = executor.plan
        runs = runs_of(plan)
        places: dict[str, Place] = {}
        for name, weight in tree.weights.items():
            if name in kept or name not in runs:
                continue
            places[name] = place = _place(weight, executor, runs[name])
            place.point(place.resting)
            self._resting[name] = RestingWeight(executor, runs[name], weight.shape, place.form)
        modules = dict(module.named_modules())
        brackets = [
            (
                Bracket(executor, index, [places[part.tensor] for part in placement.block.parts]),
                modules[placement.block.module],
            )
            for index, placement in enumerate(plan.placements)
            if placement.kind == "streamed" and placement.block.module is not None
        ]
        self._brackets = [bracket for bracket, _ in brackets]
        self._hooks = [hook for bracket, inner in brackets for hook in bracket.attach(inner)]
        if plan.streamed_order:
            self._hooks += mark_steps(steps_of, executor, self._brackets)

    def take_off(self) -> None:
        """Remove the hooks, once nothing that was asked for reads a weight any more."""
        self._executor.wait()
        for hook in self._hooks:
            hook.remove()
        for bracket in self._brackets:  # an interrupted pass may have left it pointing at a slot
            bracket.reset()

    def restore(self) -> dict[str, Exception]:
        """Bring the weights to where they were before; return what keeps some from it."""
        gone: dict[str, Exception] = {}
        for name, resting in self._resting.items():
            weight = self._tree.weights[name]
            try:
                if weight.is_away:
                    weight.restore(resting)
            except (RuntimeError, OSError) as error:
                gone[name] = error
                weight.give_up()
        return gone


def runs_of(plan: Plan) -> dict[str, list[Run]]:
    """Return by weight where its rows are, in their order."""
    runs: dict[str, list[Run]] = {}
    for index, placement in enumerate(plan.placements):
        for number, part in enumerate(placement.block.parts):
            runs.setdefault(part.tensor, []).append(Run(index, number, part))
    return runs


def _place(weight: Weight, executor: Executor, runs: Sequence[Run]) -> Place:
    """Where a weight's users find it; one that rests here whole is there for good."""
    shape, form = weight.shape, weight.form.on(executor.device)
    placement = executor.plan.placements[runs[0].block]
    resting: Tensor = RestingWeight(executor, runs, shape, form)
    if len(runs) == 1 and placement.kind == "resident":
        raw = executor.acquire(runs[0].block).part(runs[0].index)
        resting = as_parameter(form.weight(raw, shape))
    users = tuple((owner._parameters, attribute) for owner, attribute in weight.users)
    return Place(users=users, resting=resting, shape=shape, form=form)
