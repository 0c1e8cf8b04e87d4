"""What the help pages say in Chinese, and the English that is not in the node tables."""
# ruff: noqa: INP001, RUF001, E501  (a script's data; Chinese punctuation; one text a line)

from __future__ import annotations

__all__ = ["ABOUT", "BASES", "INPUTS", "TITLES"]

# What a family of nodes does, by the kit of its inputs.
ABOUT = {
    "device": (
        "Loads {thing} whole onto the device that you choose. Nothing is split.",
        "把{thing}整个加载到所选设备，不拆分。",
    ),
    "distorch2": (
        "Loads {thing}; a part of its weights rests on another device, in RAM or on disk, and streams to the device that computes. Results are the same, bit for bit.",
        "加载{thing}；一部分权重放在另一个设备、内存或磁盘上，用到时流向计算设备。结果逐位相同。",
    ),
    "distorch": (
        "Loads {thing} as the DisTorch2 node does. It is kept for workflows that were saved with it; take the DisTorch2 node in new ones.",
        "与 DisTorch2 节点一样加载{thing}。它为已保存的工作流保留；新工作流请用 DisTorch2 节点。",
    ),
}
ABOUT["distorch2_clip"] = ABOUT["distorch2"]

# What a loader loads.
BASES = {
    "UNETLoader": ("a diffusion model", "扩散模型"),
    "VAELoader": ("a VAE", "VAE"),
    "CLIPLoader": ("a text encoder", "文本编码器"),
    "DualCLIPLoader": ("two text encoders", "两个文本编码器"),
    "TripleCLIPLoader": ("three text encoders", "三个文本编码器"),
    "QuadrupleCLIPLoader": ("four text encoders", "四个文本编码器"),
    "CLIPVisionLoader": ("a CLIP vision model", "CLIP 视觉模型"),
    "CheckpointLoaderSimple": (
        "a checkpoint (its model is split, CLIP and VAE are not)",
        "checkpoint（拆分的是其中的模型，CLIP 和 VAE 不拆分）",
    ),
    "ControlNetLoader": ("a ControlNet", "ControlNet"),
    "DiffControlNetLoader": ("a ControlNet for a model", "用于某个模型的 ControlNet"),
    "DiffusersLoader": (
        "a diffusers folder (its model is split, CLIP and VAE are not)",
        "diffusers 目录（拆分的是其中的模型，CLIP 和 VAE 不拆分）",
    ),
    "UnetLoaderGGUF": ("a diffusion model from a GGUF file", "GGUF 文件中的扩散模型"),
    "UnetLoaderGGUFAdvanced": (
        "a diffusion model from a GGUF file, with the choice of dtypes",
        "GGUF 文件中的扩散模型，可选数据类型",
    ),
    "CLIPLoaderGGUF": (
        "a text encoder, from GGUF or safetensors",
        "GGUF 或 safetensors 中的文本编码器",
    ),
    "DualCLIPLoaderGGUF": (
        "two text encoders, from GGUF or safetensors",
        "两个文本编码器，GGUF 或 safetensors",
    ),
    "TripleCLIPLoaderGGUF": (
        "three text encoders, from GGUF or safetensors",
        "三个文本编码器，GGUF 或 safetensors",
    ),
    "QuadrupleCLIPLoaderGGUF": (
        "four text encoders, from GGUF or safetensors",
        "四个文本编码器，GGUF 或 safetensors",
    ),
}

# Inputs, by name; the English of the tables' own inputs is their tooltip.
INPUTS = {
    "device": "负责计算的设备。",
    "compute_device": "负责计算的设备。",
    "offload_device": "不使用时等待的设备。",
    "virtual_vram_gb": "放在出借设备上的权重，以 GiB 计；0 表示全部留在计算设备。",
    "donor_device": "出借空间的设备：内存或另一块卡。",
    "expert_mode_allocations": "一行分配，如 cuda:0,4gb;cpu,*；它优先于 virtual_vram_gb。",
    "eject_models": "加载这个模型之前卸载其他所有模型。",
    "use_other_vram": "让其他加速卡先出借，不够的由内存出借。",
    "high_precision_loras": "为旧工作流保留：LoRA 总是以模型自己的精度应用。",
    "ckpt_name": "checkpoint 文件。",
    "unet_device": "模型的设备。",
    "clip_device": "文本编码器的设备。",
    "vae_device": "VAE 的设备。",
    "unet_compute_device": "模型在哪里计算。",
    "unet_virtual_vram_gb": "模型放在出借设备上的 GiB。",
    "unet_donor_device": "模型的出借设备。",
    "clip_compute_device": "文本编码器在哪里计算。",
    "clip_virtual_vram_gb": "文本编码器放在出借设备上的 GiB。",
    "clip_donor_device": "文本编码器的出借设备。",
    "unet_expert_mode_allocations": "模型的一行分配；优先于 GiB。",
    "clip_expert_mode_allocations": "文本编码器的一行分配；优先于 GiB。",
    "allocation": "哪个设备放多少权重。第一个设备计算，其他的出借。cuda:0,4gb;cpu,* 表示 4 GiB 在卡上，其余从内存流入；auto 表示按空闲空间决定。",
    "compute": "负责计算的设备。auto：分配行中的第一个设备；分配行为 auto 时，是 ComfyUI 所用的设备。",
    "ring": "途中的权重最多占用计算设备多少显存，如 200mb。留空：刚好掩盖传输所需。",
    "keep_free_gb": "计算设备上不放权重的 GiB：留给激活值、其他模型和其他程序。图越大、视频越长，要留得越多。",
    "model": "要处理的模型（报告和预览也接受 CLIP、VAE、ControlNet）。",
    "clip": "要放置的 CLIP，来自任何加载器。",
    "vae": "要放置的 VAE，来自任何加载器。",
    "control_net": "要放置的 ControlNet，来自任何加载器。",
    "after": "要等待的节点的输出，例如采样器的 LATENT。",
    "unet_name": "模型文件。",
}

# The nodes that are ours alone: what they do.
TITLES = {
    "DistorchPlaceModel": "把已加载模型的权重分放在几处，不再读文件，结果逐位相同。LoRA 加载器放在它前面或后面都可以。",
    "DistorchPlaceCLIP": "把已加载的 CLIP 的权重分放在几处，不再读文件，结果逐位相同。",
    "DistorchPlaceVAE": "把已加载的 VAE 的权重分放在几处，不再读文件，结果逐位相同。",
    "DistorchPlaceControlNet": "把已加载的 ControlNet 的权重分放在几处，不再读文件，结果逐位相同。它必须与它的模型在同一设备上计算。",
    "DistorchAuto": "在留出指定空闲显存的前提下，尽量多地把模型留在计算设备上，其余放在到达最快的地方：其他卡、内存、磁盘。",
    "DistorchPlan": "用表格和图显示一行分配会把权重放到哪里。什么都不移动。",
    "DistorchReport": "说明已放置的模型加载以来发生了什么：各设备上的字节数、流过的字节数、计算为此停顿了多久。",
    "CheckpointLoaderAdvancedMultiGPU": "加载一个 checkpoint，各部件放在各自的设备上。",
    "CheckpointLoaderAdvancedDisTorch2MultiGPU": "加载一个 checkpoint；模型和文本编码器的权重分放在几处，VAE 整个放在一个设备上。",
    "DeviceSelectorMultiGPU": "给后面的节点指定一个设备。",
    "UNetLoaderLP": "像 ComfyUI 一样加载扩散模型；为用到它的旧工作流保留。",
}
