"""Nodes over other packs' nodes, inside a real ComfyUI; `helper_pack` stands for those packs."""

from __future__ import annotations

import pytest
import torch

from tests.comfyui.graphs import node, placement, sampled
from tests.comfyui.server import Refused, Server

pytestmark = pytest.mark.slow


def test_they_are_listed_for_the_packs_that_are_there_and_no_others(server: Server) -> None:
    listed = server.get("/object_info")
    found = listed["LTXVLoaderMultiGPU"]
    assert list(found["input"]["required"]) == ["ckpt_name", "dtype"]
    assert list(found["input"]["optional"]) == ["device"]
    assert found["display_name"] == "LTXVLoader (Device)"
    assert found["python_module"] == listed["UNETLoaderMultiGPU"]["python_module"]
    assert "Florence2ModelLoaderMultiGPU" not in listed
    text_encoder = listed["LoadWanVideoT5TextEncoderMultiGPU"]
    assert list(text_encoder["input"]["required"]) == ["model_name", "device"]
    assert text_encoder["input"]["optional"] == {}
    assert text_encoder["output"] == ["WANTEXTENCODER", "MULTIGPUDEVICE"]
    assert text_encoder["output_name"] == ["wan_t5_model", "load_device"]


def test_a_model_that_another_pack_loads_is_the_same_bits(server: Server) -> None:
    core = node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default")
    server.run(sampled({"model": core}, "core_pack", latent="wan"))
    theirs = node("LTXVLoaderMultiGPU", ckpt_name="wan.safetensors", dtype="bfloat16", device="cpu")
    server.run(placement(sampled({"model": theirs}, "pack", latent="wan"), "where_pack"))
    left, right = server.tensors("pack"), server.tensors("core_pack")
    assert torch.equal(left["samples"], right["samples"])
    assert server.json("where_pack")["device"] == "cpu"


def test_a_device_is_said_in_the_words_of_the_node_below_and_handed_on(server: Server) -> None:
    loader = node("LoadWanVideoT5TextEncoderMultiGPU", model_name="t5", device="cpu")
    saver = node("SaveWords", it=["loader", 0], device=["loader", 1], name="words")
    server.run({"loader": loader, "saver": saver})
    assert server.json("words") == ["t5 offload_device", "cpu"]


def test_a_device_of_another_machine_is_named(server: Server) -> None:
    loader = node("LoadWanVideoT5TextEncoderMultiGPU", model_name="t5", device="cuda:5")
    saver = node("SaveWords", it=["loader", 0], device=["loader", 1], name="words")
    with pytest.raises(Refused, match="asks for 'cuda:5'"):
        server.run({"loader": loader, "saver": saver})
