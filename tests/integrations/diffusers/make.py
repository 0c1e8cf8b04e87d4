"""Tiny pipelines with random weights, as the tests of pipelines take them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

if TYPE_CHECKING:
    import numpy as np

diffusers: Any = import_module("diffusers")  # it has no types

WIDTH = HEIGHT = 32
NUM_STEPS = 3


def flux_pipeline() -> Any:
    """A FLUX of four models, 40 MB: the transformer has 29, the second text encoder 9."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=256,
        pooled_projection_dim=64,
        in_channels=16,
        guidance_embeds=True,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        shift_factor=0.1,
        scaling_factor=1.0,
    )
    clip = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        vocab_size=1000,
        bos_token_id=0,
        eos_token_id=1,
    )
    t5 = T5Config(d_model=256, d_ff=512, num_layers=4, num_heads=4, d_kv=64, vocab_size=1000)
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=None,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any) -> np.ndarray[Any, Any]:
    """Make a picture of token ids that stand for a prompt."""
    device = pipe._execution_device
    ids = torch.arange(8, device=device)[None]
    with torch.inference_mode():
        found: np.ndarray[Any, Any] = pipe(
            prompt_embeds=pipe.text_encoder_2(ids)[0],
            pooled_prompt_embeds=pipe.text_encoder(ids).pooler_output,
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=NUM_STEPS,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
    return found
