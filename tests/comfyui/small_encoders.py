"""Has ComfyUI build its largest text encoders small; a pack of the tests.

T5, CLIP-G and Llama have their sizes written down in ComfyUI, billions of weights. It lets a caller
say others for each by name, and here that is said for every caller.
"""

from __future__ import annotations

import sys
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, type] = {}

CLIP_G = {"num_hidden_layers": 3, "intermediate_size": 256}
T5 = {"num_layers": 1, "d_ff": 128, "d_kv": 64, "num_heads": 2}
LLAMA = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,  # which ComfyUI fixes
    "vocab_size": 128256,
}


def _make_small() -> None:
    from comfy.sd1_clip import SDClipModel

    sizes = {
        "clip_g_model_config": CLIP_G,
        "t5xxl_model_config": T5,
        "llama_model_config": {k: size for k, size in LLAMA.items() if k != "head_dim"},
    }
    build = SDClipModel.__init__

    def init(self: Any, *args: Any, model_options: Any = None, **more: Any) -> None:
        build(self, *args, model_options={**(model_options or {}), **sizes}, **more)

    SDClipModel.__init__ = init


if "comfy" in sys.modules:
    _make_small()
