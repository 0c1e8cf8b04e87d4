"""No line at all: ``auto`` fills the card, then RAM, and leaves the rest on disk.

    python examples/auto.py --model Llama-3.1-8B

Expect all of it on the card if there is room for it. After ``distorch probe`` the machine's links
and speeds are known, and the plan is the fastest that the simulator finds.
"""

import shared
import tiny
import torch

import distorch


def main() -> None:
    """Show what `auto` comes to, and run it."""
    asked = shared.arguments(__doc__, tiny.language_model, "auto")
    model = distorch.load(asked.model, asked.allocation)
    handle = distorch.handle_of(model)
    for name, value in handle.plan.table():
        print(f"{name:20}{value}")
    watch = shared.Watch(handle)
    with torch.inference_mode():
        model(torch.arange(8, device=model.device)[None])
    watch.report()


if __name__ == "__main__":
    main()
