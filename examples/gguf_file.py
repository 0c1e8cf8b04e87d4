r"""A pipeline whose transformer is a GGUF file, as people share them.

    python examples/gguf_file.py --model FLUX.1-dev --file flux1-dev-Q4_K_S.gguf \
        --allocation "cuda:0,4gb;cpu,*"

The weights stay packed wherever they rest and while they move; each is decoded where it is used.
The directory needs no weights of the transformer. Expect 6.3 GiB of transformer instead of 22.
"""

import tempfile
from pathlib import Path

import shared
import tiny
import torch

import distorch
from distorch.convert import convert


def main() -> None:
    """Draw one picture."""
    asked = shared.arguments(__doc__, lambda: tiny.pipeline("flux"), "cpu,4mb;disk,*", "file")
    with tempfile.TemporaryDirectory() as folder:
        if asked.file is None:
            asked.file = Path(folder, "flux-Q4_K.gguf")
            convert(asked.model / "transformer", asked.file, "Q4_K")
        pipe = distorch.load(asked.model, asked.allocation, files={"transformer": asked.file})
        handle = distorch.handle_of(pipe)
        watch = shared.Watch(handle)
        made = pipe(
            asked.prompt,
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=watch,
            **asked.call,
        )
        shared.save(made, asked.output)
        whole = sum(weight.numel() for weight in pipe.transformer.parameters()) * 2
        packed = handle["transformer"].plan.model_bytes
        print(f"the transformer has {shared.mib(packed)}; bfloat16 would be {shared.mib(whole)}")
        watch.report()


if __name__ == "__main__":
    main()
