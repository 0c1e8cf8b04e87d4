"""The memory of a language model: keys and values of the tokens so far, for which room is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["cache_bytes"]


def cache_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Return the most bytes that ``generate`` keeps of one text of so many tokens.

    A layer of a sliding window keeps no more than that. A layer's part grows by being copied, so
    the largest is there twice for a moment. Nothing is said (0) of models that write no text, have
    no attention, or have an encoder.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        return 0
    config: PretrainedConfig = model.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_attention_heads", 0)
    if not num_heads:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or num_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    window = getattr(config, "sliding_window", None)
    usual = ["sliding" if window else "full"] * config.num_hidden_layers  # as transformers takes it
    kinds = getattr(config, "layer_types", None) or usual
    most = min(num_tokens, window or num_tokens)
    kept = [most if "sliding" in kind else num_tokens for kind in kinds]
    itemsize = model.dtype.itemsize
    return int(2 * heads * width * itemsize * (sum(kept) + max(kept, default=0)))
