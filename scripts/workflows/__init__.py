"""The example workflows, described in Python; ``python scripts/make_workflows.py`` writes them.

A workflow is a function that makes a `Flow`, calls it once a node and returns it:

    def sdxl() -> Flow:
        f = Flow("04 sdxl", "What the note on the page says.")
        loaded = f("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors")
        image(f, loaded, loaded[1], loaded[2], f("EmptyLatentImage"), "a tram in the rain")
        return f

`loaders`, `gguf`, `packs`, `wan` and `placing` describe them, `parts` is what several of these
share, `nodes` says which inputs the nodes of others have (ours are read from the node tables),
`flow` makes the JSON, `drawing` the layout and the picture.
"""

from __future__ import annotations

from collections.abc import Iterator

from workflows import gguf, loaders, packs, placing, wan
from workflows.flow import Flow

__all__ = ["flows"]


def flows() -> Iterator[Flow]:
    """Describe each workflow."""
    for module in (loaders, gguf, packs, wan, placing):
        for describe in module.FLOWS:
            yield describe()
