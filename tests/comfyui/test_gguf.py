"""GGUF models and text encoders by our reader, in a real ComfyUI: core's bits everywhere."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.comfyui.graphs import Graph, encoded, node, placement, sampled, with_lora
from tests.comfyui.needs import run_with_flux
from tests.comfyui.server import Refused, Server

LINE = "cpu,1mb;disk,*"
CONVOLUTION = "patch_embedding.weight"
SMALL = 4096  # elements: smaller tensors are kept as they are


def write_gguf(
    path: Path, weights: dict[str, Tensor], form: str, arch: str, flat: Collection[str] = ()
) -> dict[str, Tensor]:
    """Write weights packed where a row is whole blocks; return what each stands for, dense.

    ``flat`` are stored as matrices, with their shapes beside them.
    """
    kind, dense = gguf.GGMLQuantizationType[form], {}
    block = gguf.GGML_QUANT_SIZES[kind][0]
    writer = gguf.GGUFWriter(path, arch)
    for name, weight in weights.items():
        shape, values = weight.shape, weight.float().contiguous().numpy()
        if name in flat:
            values = values.reshape(shape[0], -1)
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
        if values.ndim != 2 or values.shape[1] % block or values.size < SMALL:
            writer.add_tensor(name, values)
            dense[name] = torch.from_numpy(values)
            continue
        quantise = libgguf.quantize_rows if form.endswith("K") else gguf.quants.quantize
        rows = np.ascontiguousarray(quantise(values, kind)).view(np.uint8)
        rows = rows.reshape(len(values), -1)
        writer.add_tensor(name, rows, raw_dtype=kind)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(rows, kind).reshape(shape).copy())
    _finish(writer)
    return dense


def _write_activations(path: Path) -> None:
    """Write a weight in a format of the file's that nothing stores weights in."""
    writer, kind = gguf.GGUFWriter(path, "wan"), gguf.GGMLQuantizationType.Q8_1
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = np.zeros((256, 256 // block * block_bytes), np.uint8)
    writer.add_tensor("blocks.0.ffn.0.weight", rows, raw_dtype=kind)
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def models(server: Server) -> Server:
    """The server, with models in GGUF, and what their weights stand for beside them."""
    folder = server.base / "models" / "diffusion_models"
    for model in ("flux", "wan"):
        weights = load_file(folder / f"{model}.safetensors")
        for form in ("Q8_0", "Q4_K"):
            stem = f"{model}_{form}"
            dense = write_gguf(folder / f"{stem}.gguf", weights, form, model)
            save_file(dense, folder / f"{stem}_dense.safetensors")
    prefixed = {f"model.diffusion_model.{name}": each for name, each in weights.items()}
    write_gguf(folder / "prefixed.gguf", prefixed, "Q8_0", "wan")
    dense = write_gguf(folder / "flat.gguf", weights, "Q8_0", "wan", [CONVOLUTION])
    save_file(dense, folder / "flat_dense.safetensors")
    _write_activations(folder / "unknown.gguf")
    return server


def core(stem: str) -> Graph:
    name = f"{stem}_dense.safetensors"
    return {"model": node("UNETLoader", unet_name=name, weight_dtype="default")}


def ours(name: str, line: str = "") -> Graph:
    if not line:
        return {"model": node("UnetLoaderGGUFMultiGPU", unet_name=f"{name}.gguf", device="cpu")}
    return {
        "model": node(
            "UnetLoaderGGUFDisTorch2MultiGPU",
            unet_name=f"{name}.gguf",
            compute_device="cpu",
            virtual_vram_gb=0.0,
            donor_device="cpu",
            expert_mode_allocations=line,
            eject_models=False,
        )
    }


def run(server: Server, graph: Graph, name: str) -> Tensor:
    run_with_flux(server, graph)
    return server.tensors(name)["samples"]


@pytest.mark.parametrize("strength", [None, 1.0, 0.5])
@pytest.mark.parametrize("form", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("model", ["wan", "flux"])
def test_packed_weights_give_cores_bits_resident_and_spilled(
    models: Server, model: str, form: str, strength: float | None
) -> None:
    stem = f"{model}_{form}"

    def latent(name: str, loader: Graph) -> Tensor:
        name = f"{stem}_{strength}_{name}"
        graph = sampled(loader, name, latent=model)
        graph = graph if strength is None else with_lora(graph, model, strength)
        return run(models, placement(graph, name), name)

    expected = latent("core", core(stem))
    assert torch.equal(latent("resident", ours(stem)), expected)
    assert torch.equal(latent("spilled", ours(stem, LINE)), expected)
    where = models.json(f"{stem}_{strength}_spilled")
    packed_bytes = (models.base / "models/diffusion_models" / f"{stem}.gguf").stat().st_size
    assert where["steps"] > 0
    assert where["bytes"]["disk"] > 2**20
    assert sum(where["bytes"].values()) < 1.1 * packed_bytes


def test_keys_of_a_whole_checkpoint_are_understood(models: Server) -> None:
    expected = run(models, sampled(core("wan_Q8_0"), "bare", latent="wan"), "bare")
    prefixed = sampled(ours("prefixed"), "prefixed", latent="wan")
    assert torch.equal(run(models, prefixed, "prefixed"), expected)


@pytest.mark.parametrize("line", ["", LINE])
def test_a_convolution_that_is_stored_flat_has_its_shape(models: Server, line: str) -> None:
    expected = run(models, sampled(core("flat"), "flat_core", latent="wan"), "flat_core")
    name = f"flat_{len(line)}"
    assert torch.equal(run(models, sampled(ours("flat", line), name, latent="wan"), name), expected)


def test_a_format_that_cannot_be_computed_with_is_named_with_its_tensor(models: Server) -> None:
    with pytest.raises(Refused, match=r"blocks\.0\.ffn\.0\.weight: .*Q8_1"):
        models.run(sampled(ours("unknown"), "unknown", latent="wan"))


def test_rounding_and_lora_dtypes_are_those_that_are_asked_for(models: Server) -> None:
    inputs = {"unet_name": "wan_Q8_0.gguf", "device": "cpu", "patch_on_device": False}

    def latent(name: str, dequant: str, patch: str) -> Tensor:
        loader = node(
            "UnetLoaderGGUFAdvancedMultiGPU", **inputs, dequant_dtype=dequant, patch_dtype=patch
        )
        graph = with_lora(sampled({"model": loader}, name, latent="wan"), "wan", 1.0)
        return run(models, graph, name)

    plain = latent("dtypes", "default", "default")
    assert torch.equal(latent("target", "target", "target"), plain)
    for name, dtypes in {"a": ("float16", "default"), "b": ("default", "bfloat16")}.items():
        other = latent(f"dtypes_{name}", *dtypes)
        assert not torch.equal(other, plain)
        assert torch.allclose(other, plain, atol=0.1)


def t5_weights() -> dict[str, Tensor]:
    """T5 base under llama.cpp's names, of values that Q8_0 and float16 hold exactly."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randint(-60, 61, (rows, columns), generator=generator).float()
        values[:, ::32] = 127  # the largest of each block: its scale is 2**-10
        return values / 1024

    width, inner = 768, 3072
    weights = {"token_embd.weight": matrix(32128, width), "enc.output_norm.weight": torch.ones(768)}
    weights["enc.blk.0.attn_rel_b.weight"] = torch.randn(32, 12, generator=generator).half().float()
    for layer in range(12):
        block = f"enc.blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_o"):
            weights[f"{block}{name}.weight"] = matrix(width, width)
        weights[f"{block}ffn_up.weight"] = matrix(inner, width)
        weights[f"{block}ffn_down.weight"] = matrix(width, inner)
        for name in ("attn_norm", "ffn_norm"):
            weights[f"{block}{name}.weight"] = torch.ones(width)
    return weights


@pytest.mark.slow
def test_a_t5_gives_cores_conditioning_resident_and_spilled(server: Server) -> None:
    from distorch.integrations.comfyui.gguf_names import encoder_names

    folder = server.base / "models" / "text_encoders"
    weights = t5_weights()
    write_gguf(folder / "t5.gguf", weights, "Q8_0", "t5encoder")
    names = encoder_names("t5encoder", weights)
    halves = {names[name]: weight.half() for name, weight in weights.items()}
    save_file(halves, folder / "t5.safetensors")
    kind = {"type": "stable_audio"}
    expected = encoded({"clip": node("CLIPLoader", clip_name="t5.safetensors", **kind)}, "t5_core")
    resident = node("CLIPLoaderGGUFMultiGPU", clip_name="t5.gguf", device="cpu", **kind)
    spilled = node(
        "CLIPLoaderGGUFDisTorch2MultiGPU",
        clip_name="t5.gguf",
        device="cpu",
        virtual_vram_gb=0.0,
        donor_device="cpu",
        expert_mode_allocations=LINE,
        eject_models=False,
        **kind,
    )
    server.run(expected)
    for name, loader in {"resident": resident, "spilled": spilled}.items():
        server.run(encoded({"clip": loader}, name))
        assert torch.equal(server.tensors(name)["tokens"], server.tensors("t5_core")["tokens"])
