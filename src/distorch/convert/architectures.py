"""Models of images and videos, known by the names of their tensors, and what stays precise in each.

Names are those of the models' authors, which ComfyUI-GGUF loads and diffusers' `from_single_file`
maps to its own; which weights stay precise is ComfyUI-GGUF's choice. A model in diffusers' own
names is another architecture, called by its class: diffusers loads such a file, ComfyUI does not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from distorch.errors import ModelError

__all__ = ["ARCHITECTURES", "Architecture", "architecture_named", "detect", "matches", "prefix"]

_PREFIX: Final = "model.diffusion_model."  # of a file that holds other models besides
_WHOLE_PREFIXES: Final = ("model.", "net.")  # of files in which every name has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model by its name in GGUF files; patterns are those of a shell, with ``*`` and ``?``.

    ``signatures`` are sets of names, one of which is whole in a file of this model. Matrices that
    match ``kept`` stay in the precision they have, tensors that match ``exact`` are float32, and
    those that match ``left_out`` are not weights. A model that ``folds`` has its odd shapes stored
    as rows of 256, with the shape beside. One ``of_diffusers`` has diffusers' names.
    """

    name: str
    signatures: tuple[tuple[str, ...], ...] = ()
    kept: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    folds: bool = False
    of_diffusers: bool = False


_FLUX_ENDS: Final = (
    *("txt_in.*", "img_in.*", "time_in.*", "vector_in.*", "guidance_in.*", "final_layer.*"),
    "distilled_guidance_layer.*",
)
_SD_ENDS: Final = (
    *("class_embedding.*", "time_embedding.*", "add_embedding.*", "time_embed.*", "label_emb.*"),
    *("conv_in.*", "conv_out.*", "input_blocks.0.0.weight", "out.2.weight"),
)
_DIFFUSERS_ENDS: Final = (
    *("*x_embedder.*", "*context_embedder.*", "*time_text_embed.*", "*condition_embedder.*"),
    *("*time_embed.*", "*time_proj.*", "*patch_embed*", "*caption_projection.*", "*pos_embed*"),
    *("norm_out.*", "proj_in.*", "proj_out.*"),
)

ARCHITECTURES: Final = {
    found.name: found
    for found in (  # the first that matches counts: Hunyuan's names include one of Flux'
        Architecture(
            name="hyvid",
            signatures=(("txt_in.individual_token_refiner.blocks.0.norm1.weight",),),
            kept=_FLUX_ENDS,
        ),
        Architecture(
            name="flux",
            signatures=(("double_blocks.0.img_attn.proj.weight",),),
            kept=_FLUX_ENDS,
        ),
        Architecture(
            name="qwen_image",  # its authors' names are those of diffusers
            signatures=(("txt_norm.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"),),
            kept=("img_in.*", "txt_in.*", "time_text_embed.*", "norm_out.*", "proj_out.*"),
        ),
        Architecture(
            name="sd3",
            signatures=(("joint_blocks.0.x_block.attn.qkv.weight",),),
            kept=(
                *("final_layer.*", "time_text_embed.*", "context_embedder.*", "t_embedder.*"),
                *("y_embedder.*", "x_embedder.*", "proj_out.weight", "pos_embed"),
            ),
        ),
        Architecture(
            name="aura",
            signatures=(("double_layers.3.modX.1.weight",),),
            kept=(
                *("t_embedder.*", "init_x_linear.*", "modF.1.weight", "cond_seq_linear.weight"),
                *("final_linear.weight", "positional_encoding", "register_tokens"),
            ),
        ),
        Architecture(
            name="hidream",
            signatures=(
                (
                    "caption_projection.0.linear.weight",
                    "double_stream_blocks.0.block.ff_i.shared_experts.w3.weight",
                ),
            ),
            kept=(
                *("p_embedder.*", "t_embedder.*", "x_embedder.*", "final_layer.*"),
                "caption_projection.*",
            ),
            exact=("*.ff_i.gate.weight", "*img_emb.emb_pos"),
        ),
        Architecture(
            name="cosmos",
            signatures=(
                ("blocks.0.mlp.layer1.weight", "blocks.0.adaln_modulation_cross_attn.1.weight"),
            ),
            kept=(
                *("p_embedder.*", "t_embedder.*", "t_embedding_norm.*", "x_embedder.*"),
                "final_layer.*",
            ),
            exact=("*pos_embedder*",),
            left_out=("*_extra_state*", "*accum_*"),
        ),
        Architecture(
            name="ltxv",
            signatures=(
                (
                    "adaln_single.emb.timestep_embedder.linear_2.weight",
                    "transformer_blocks.27.scale_shift_table",
                    "caption_projection.linear_2.weight",
                ),
            ),
            kept=("adaln_single.*", "caption_projection.*", "patchify_proj.*", "proj_out.*"),
            exact=("*scale_shift_table",),
        ),
        Architecture(
            name="wan",
            signatures=(
                ("blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight", "head.modulation"),
            ),
            kept=(
                *("patch_embedding.*", "text_embedding.*", "time_projection.*"),
                *("time_embedding.*", "img_emb.*", "head.*"),
            ),
            exact=("*modulation", "img_emb.emb_pos"),
        ),
        Architecture(
            name="sdxl",
            signatures=(
                ("down_blocks.0.downsamplers.0.conv.weight", "add_embedding.linear_1.weight"),
                (
                    *("input_blocks.3.0.op.weight", "input_blocks.6.0.op.weight"),
                    *("output_blocks.2.2.conv.weight", "output_blocks.5.2.conv.weight"),
                ),
                ("label_emb.0.0.weight",),
            ),
            kept=_SD_ENDS,
            folds=True,
        ),
        Architecture(
            name="sd1",
            signatures=(
                ("down_blocks.0.downsamplers.0.conv.weight",),
                (
                    *("input_blocks.3.0.op.weight", "input_blocks.6.0.op.weight"),
                    *("input_blocks.9.0.op.weight", "output_blocks.2.1.conv.weight"),
                    *("output_blocks.5.2.conv.weight", "output_blocks.8.2.conv.weight"),
                ),
            ),
            kept=_SD_ENDS,
            folds=True,
        ),
        Architecture(
            name="lumina2",  # and Z-Image
            signatures=(("cap_embedder.1.weight", "context_refiner.0.attention.qkv.weight"),),
            kept=(
                *("t_embedder.*", "x_embedder.*", "final_layer.*", "cap_embedder.*"),
                *("context_refiner.*", "noise_refiner.*"),
            ),
        ),
    )
}
"""Every architecture that ComfyUI-GGUF loads as a diffusion model, by name."""

_DIFFUSERS_CLASSES: Final = frozenset(
    f"{stem}Transformer{dims}Model"
    for dims, stems in {
        "2D": "AuraFlow Chroma ErnieImage Flux Flux2 HiDreamImage Krea2 Lumina2 QwenImage SD3 Sana"
        " ZImage",
        "3D": "ChronoEdit Cosmos HunyuanVideo LTXVideo LTX2Video Mochi SkyReelsV2 Wan WanAnimate"
        " WanVACE",
    }.items()
    for stem in stems.split()
)
"""Classes of diffusers that have ``from_single_file``, so that they load GGUF."""

_LANGUAGE: Final = re.compile(
    r"(.*\.)?(layers\.\d+\.(self_attn\.q_proj|attention\.wq|mlp\.gate_proj)|h\.\d+\.attn\.c_attn"
    r"|block\.\d+\.layer\.0\.SelfAttention\.q|blk\.\d+\.attn_(q|qkv)|token_embd)\.weight"
)


def prefix(names: Collection[str]) -> str:
    """Return what stands before the names of the diffusion model's tensors; others have it not.

    >>> prefix(["model.diffusion_model.img_in.weight", "vae.conv.weight"]), prefix(["img_in.bias"])
    ('model.diffusion_model.', '')
    """
    if any(name.startswith(_PREFIX) for name in names):
        return _PREFIX
    whole = (p for p in _WHOLE_PREFIXES if names and all(name.startswith(p) for name in names))
    return next(whole, "")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns is that of a name.

    >>> matches("head.head.weight", ("img_emb.*", "head.*"))
    True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def architecture_named(name: str) -> Architecture:
    """Return the architecture that a user or a configuration names.

    Raises:
        ModelError: neither ComfyUI-GGUF nor diffusers loads one of that name.

    >>> architecture_named("wan").exact[0], architecture_named("WanTransformer3DModel").of_diffusers
    ('*modulation', True)
    """
    if name in _DIFFUSERS_CLASSES:
        return Architecture(
            name=name,
            kept=_DIFFUSERS_ENDS,
            exact=("*scale_shift_table", "*modulation"),
            of_diffusers=True,
        )
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    raise ModelError(
        f"nothing is known to load a GGUF file of the architecture {name!r:.100}; known are "
        f"{', '.join(ARCHITECTURES)}; and of diffusers {', '.join(sorted(_DIFFUSERS_CLASSES))}",
        hint="--architecture flux",
    )


def detect(names: Collection[str], class_name: str | None) -> Architecture:
    """Return the architecture of a model by its tensors, ``class_name`` being diffusers' for it.

    Raises:
        ModelError: the tensors are those of no model that is known.

    >>> detect({"double_blocks.0.img_attn.proj.weight"}, None).name
    'flux'
    """
    for found in ARCHITECTURES.values():
        if any(all(name in names for name in signature) for signature in found.signatures):
            return found
    if class_name in _DIFFUSERS_CLASSES:
        return architecture_named(class_name)
    if any(_LANGUAGE.fullmatch(name) for name in names):
        raise ModelError(
            "these are the tensors of a language model, whose GGUF also holds a tokenizer and a "
            "configuration",
            hint="llama.cpp: convert_hf_to_gguf.py, then llama-quantize; or write safetensors",
        )
    if class_name is not None:
        raise ModelError(
            f"neither ComfyUI nor diffusers loads the class {class_name:.100} from GGUF",
            hint="the model in its authors' own layout, or an OUT that ends in .safetensors",
        )
    raise ModelError(
        "these tensors are of no architecture that is known; known are "
        f"{', '.join(ARCHITECTURES)}, and diffusers' directories with their config.json",
        hint="--architecture flux, if it is one of them after all; or write safetensors",
    )
