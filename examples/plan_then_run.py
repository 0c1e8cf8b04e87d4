r"""A plan made once, kept in a file, and run as it is.

    python examples/plan_then_run.py --model Llama-3.1-8B --allocation "cuda:0,6gb;cpu,*" \
        --plan plan.json

``distorch plan MODEL --save plan.json`` writes such a file without loading anything. Expect the
same placement from the same file, whatever else the machine is doing.
"""

from pathlib import Path

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Plan and save; then load by the saved plan."""
    asked = shared.arguments(__doc__, tiny.language_model, "cpu,4mb;disk,*", "plan")
    path = asked.plan or Path("plan.json")
    if not path.exists():
        planned = distorch.handle_of(distorch.load(asked.model, asked.allocation)).plan
        path.write_text(planned.to_json(), encoding="utf-8")
    plan = distorch.Plan.from_json(path.read_text(encoding="utf-8"))
    print(f"{path}: {len(plan.placements)} blocks by {plan.allocation!r}")
    model = distorch.load(asked.model, plan)
    handle = distorch.handle_of(model)
    if handle.plan.placements != plan.placements:
        raise SystemExit("the plan was not carried out")
    watch = shared.Watch(handle)
    with torch.inference_mode():
        model(torch.arange(8, device=model.device)[None])
    watch.report()


if __name__ == "__main__":
    main()
