"""How the authors of models lay out the weights that diffusers lays out anew.

The tables are the layouts as they are published, written down once more, so that nothing here leans
on diffusers' converters: the authors' name stands first, then diffusers'. A ``#`` is a number, a
``+`` joins what the authors keep as one tensor, and a ``~`` swaps the halves of one.
"""

from __future__ import annotations

FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "double_blocks.#.img_attn.qkv": "transformer_blocks.#.attn.to_q + "
    "transformer_blocks.#.attn.to_k + transformer_blocks.#.attn.to_v",
    "double_blocks.#.txt_attn.qkv": "transformer_blocks.#.attn.add_q_proj + "
    "transformer_blocks.#.attn.add_k_proj + transformer_blocks.#.attn.add_v_proj",
    "double_blocks.#.img_attn.norm.query_norm.scale": "transformer_blocks.#.attn.norm_q.weight",
    "double_blocks.#.img_attn.norm.key_norm.scale": "transformer_blocks.#.attn.norm_k.weight",
    "double_blocks.#.txt_attn.norm.query_norm.scale": (
        "transformer_blocks.#.attn.norm_added_q.weight"
    ),
    "double_blocks.#.txt_attn.norm.key_norm.scale": "transformer_blocks.#.attn.norm_added_k.weight",
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_q + "
    "single_transformer_blocks.#.attn.to_k + single_transformer_blocks.#.attn.to_v + "
    "single_transformer_blocks.#.proj_mlp",
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.norm.query_norm.scale": "single_transformer_blocks.#.attn.norm_q.weight",
    "single_blocks.#.norm.key_norm.scale": "single_transformer_blocks.#.attn.norm_k.weight",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
FLUX_2 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **{
        name: place
        for name, place in FLUX.items()
        if name.startswith("double_blocks") and not name.endswith(("lin", "mlp.0", "mlp.2"))
    },
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.linear_in",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.linear_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.linear_in",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.linear_out",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
    "single_blocks.#.linear2": "single_transformer_blocks.#.attn.to_out",
    "single_blocks.#.norm.query_norm.scale": "single_transformer_blocks.#.attn.norm_q.weight",
    "single_blocks.#.norm.key_norm.scale": "single_transformer_blocks.#.attn.norm_k.weight",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
WAN = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "blocks.#.self_attn.q": "blocks.#.attn1.to_q",
    "blocks.#.self_attn.k": "blocks.#.attn1.to_k",
    "blocks.#.self_attn.v": "blocks.#.attn1.to_v",
    "blocks.#.self_attn.o": "blocks.#.attn1.to_out.0",
    "blocks.#.self_attn.norm_q": "blocks.#.attn1.norm_q",
    "blocks.#.self_attn.norm_k": "blocks.#.attn1.norm_k",
    "blocks.#.cross_attn.q": "blocks.#.attn2.to_q",
    "blocks.#.cross_attn.k": "blocks.#.attn2.to_k",
    "blocks.#.cross_attn.v": "blocks.#.attn2.to_v",
    "blocks.#.cross_attn.o": "blocks.#.attn2.to_out.0",
    "blocks.#.cross_attn.norm_q": "blocks.#.attn2.norm_q",
    "blocks.#.cross_attn.norm_k": "blocks.#.attn2.norm_k",
    "blocks.#.cross_attn.k_img": "blocks.#.attn2.add_k_proj",
    "blocks.#.cross_attn.v_img": "blocks.#.attn2.add_v_proj",
    "blocks.#.cross_attn.norm_k_img": "blocks.#.attn2.norm_added_k",
    "blocks.#.norm3": "blocks.#.norm2",  # the one with weights
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    "blocks.#.modulation": "blocks.#.scale_shift_table",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
Z_IMAGE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{
        f"{layers}.#.attention.{name}": " + ".join(
            f"{layers}.#.attention.{place}" for place in places
        )
        for layers in ("layers", "noise_refiner", "context_refiner")
        for name, places in {
            "qkv": ("to_q", "to_k", "to_v"),
            "out": ("to_out.0",),
            "q_norm": ("norm_q",),
            "k_norm": ("norm_k",),
        }.items()
    },
}
SD3 = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
    # the last block has only a scale and a shift for its context
    "joint_blocks.2.context_block.adaLN_modulation.1": "~transformer_blocks.2.norm1_context.linear",
    "joint_blocks.#.context_block.adaLN_modulation.1": "transformer_blocks.#.norm1_context.linear",
    "joint_blocks.#.x_block.attn.qkv": FLUX["double_blocks.#.img_attn.qkv"],
    "joint_blocks.#.context_block.attn.qkv": FLUX["double_blocks.#.txt_attn.qkv"],
    "joint_blocks.#.x_block.attn2.qkv": "transformer_blocks.#.attn2.to_q + "
    "transformer_blocks.#.attn2.to_k + transformer_blocks.#.attn2.to_v",
    "joint_blocks.#.x_block.attn.ln_q": "transformer_blocks.#.attn.norm_q",
    "joint_blocks.#.x_block.attn.ln_k": "transformer_blocks.#.attn.norm_k",
    "joint_blocks.#.context_block.attn.ln_q": "transformer_blocks.#.attn.norm_added_q",
    "joint_blocks.#.context_block.attn.ln_k": "transformer_blocks.#.attn.norm_added_k",
    "joint_blocks.#.x_block.attn2.ln_q": "transformer_blocks.#.attn2.norm_q",
    "joint_blocks.#.x_block.attn2.ln_k": "transformer_blocks.#.attn2.norm_k",
    "joint_blocks.#.x_block.attn.proj": "transformer_blocks.#.attn.to_out.0",
    "joint_blocks.#.context_block.attn.proj": "transformer_blocks.#.attn.to_add_out",
    "joint_blocks.#.x_block.attn2.proj": "transformer_blocks.#.attn2.to_out.0",
    "joint_blocks.#.x_block.mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "joint_blocks.#.x_block.mlp.fc2": "transformer_blocks.#.ff.net.2",
    "joint_blocks.#.context_block.mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "joint_blocks.#.context_block.mlp.fc2": "transformer_blocks.#.ff_context.net.2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
LTX = {
    "patchify_proj": "proj_in",
    "adaln_single.linear": "time_embed.linear",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed.emb.timestep_embedder.linear_1",
    "adaln_single.emb.timestep_embedder.linear_2": "time_embed.emb.timestep_embedder.linear_2",
    "transformer_blocks.#.attn1.q_norm": "transformer_blocks.#.attn1.norm_q",
    "transformer_blocks.#.attn1.k_norm": "transformer_blocks.#.attn1.norm_k",
    "transformer_blocks.#.attn2.q_norm": "transformer_blocks.#.attn2.norm_q",
    "transformer_blocks.#.attn2.k_norm": "transformer_blocks.#.attn2.norm_k",
}
_REFINER = "context_embedder.token_refiner.refiner_blocks.#"
_REFINED = "txt_in.individual_token_refiner.blocks.#"
HUNYUAN_VIDEO = {
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    f"{_REFINED}.norm1": f"{_REFINER}.norm1",
    f"{_REFINED}.norm2": f"{_REFINER}.norm2",
    f"{_REFINED}.self_attn_qkv": f"{_REFINER}.attn.to_q + {_REFINER}.attn.to_k + "
    f"{_REFINER}.attn.to_v",
    f"{_REFINED}.self_attn_proj": f"{_REFINER}.attn.to_out.0",
    f"{_REFINED}.mlp.fc1": f"{_REFINER}.ff.net.0.proj",
    f"{_REFINED}.mlp.fc2": f"{_REFINER}.ff.net.2",
    f"{_REFINED}.adaLN_modulation.1": f"{_REFINER}.norm_out.linear",
    "double_blocks.#.img_mod.linear": FLUX["double_blocks.#.img_mod.lin"],
    "double_blocks.#.txt_mod.linear": FLUX["double_blocks.#.txt_mod.lin"],
    "double_blocks.#.img_attn_qkv": FLUX["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.txt_attn_qkv": FLUX["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.img_attn_q_norm": "transformer_blocks.#.attn.norm_q",
    "double_blocks.#.img_attn_k_norm": "transformer_blocks.#.attn.norm_k",
    "double_blocks.#.txt_attn_q_norm": "transformer_blocks.#.attn.norm_added_q",
    "double_blocks.#.txt_attn_k_norm": "transformer_blocks.#.attn.norm_added_k",
    "double_blocks.#.img_attn_proj": FLUX["double_blocks.#.img_attn.proj"],
    "double_blocks.#.txt_attn_proj": FLUX["double_blocks.#.txt_attn.proj"],
    "double_blocks.#.img_mlp.fc1": FLUX["double_blocks.#.img_mlp.0"],
    "double_blocks.#.img_mlp.fc2": FLUX["double_blocks.#.img_mlp.2"],
    "double_blocks.#.txt_mlp.fc1": FLUX["double_blocks.#.txt_mlp.0"],
    "double_blocks.#.txt_mlp.fc2": FLUX["double_blocks.#.txt_mlp.2"],
    "single_blocks.#.modulation.linear": FLUX["single_blocks.#.modulation.lin"],
    "single_blocks.#.linear1": FLUX["single_blocks.#.linear1"],
    "single_blocks.#.linear2": FLUX["single_blocks.#.linear2"],
    "single_blocks.#.q_norm": "single_transformer_blocks.#.attn.norm_q",
    "single_blocks.#.k_norm": "single_transformer_blocks.#.attn.norm_k",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "~norm_out.linear",
}
