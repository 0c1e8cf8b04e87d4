"""Any ``nn.Module``: distributed in place, and an ordinary module again afterwards.

    python examples/plain_module.py --allocation "cuda:0,100mb;cpu,*"

Expect the same bits as before, during and after.
"""

import shared
import tiny
import torch
from torch import nn

import distorch


def main() -> None:
    """Compare what a module computes: plain, distributed, and plain again."""
    asked = shared.arguments(__doc__, tiny.nothing, "cpu,8mb;disk,*")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).eval()
    compute = distorch.Allocation.parse(asked.allocation).entries[0].device
    x = torch.randn(4, 1024)
    with torch.inference_mode():
        expected = model.to(compute)(x.to(compute))
        model.cpu()
        handle = distorch.distribute(model, asked.allocation)
        watch = shared.Watch(handle)
        same = torch.equal(model(x.to(compute)), expected)
        watch.report()
        handle.remove()
        again = torch.equal(model.to(compute)(x.to(compute)), expected)
    print(f"the same bits: distributed {same}, afterwards {again}")
    if not (same and again):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
