"""``distorch run`` of a pipeline: a picture, a video, what it cost, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from distorch.convert import convert
from examples import tiny
from tests.cli.make import invoke, tiny_llama

LINE = ("--allocation", "cpu,8mb;disk,*")
ASKED = ("--prompt", "a fox", "--size", "32x32", "--steps", 2)


def _run(kind: str, *more: object) -> Any:
    done = invoke("run", tiny.pipeline(kind), *ASKED, *LINE, *more, "--json")
    assert done.code == 0, done.err
    return done.json


def _refuse(kind: str, *more: object) -> str:
    done = invoke("run", tiny.pipeline(kind), *more)
    assert (done.code, done.out) == (2, ""), done
    return done.err


def test_a_picture_is_the_same_wherever_its_weights_rest(tmp_path: Path) -> None:
    pixels = []
    for line in ("cpu,*", "cpu,8mb;disk,*", "cpu,0b;disk,*"):
        said = _run("flux", "--allocation", line, "--output", tmp_path / "out.png")
        assert said["output"] == [str(tmp_path / "out.png")]
        pixels.append(Image.open(tmp_path / "out.png").tobytes())
        assert set(said["models"]) == {"vae", "text_encoder", "text_encoder_2", "transformer"}
        assert said["num_steps"] == 2
        assert said["seconds_per_step"] > 0
        placed = said["models"]["transformer"]["bytes_by_tier"]
        assert sum(placed.values()) == said["models"]["transformer"]["model_bytes"]
    assert pixels[0] == pixels[1] == pixels[2]
    assert len(set(pixels[0])) > 16, "a picture, not a surface"
    assert said["peak_weight_bytes"]["cpu"] < said["model_bytes"]
    other = _run("flux", "--seed", 1, "--output", tmp_path / "other.png")
    assert Image.open(other["output"][0]).tobytes() != pixels[0]


def test_a_video_is_a_file_or_a_folder_of_frames(tmp_path: Path) -> None:
    asked = ("--frames", 5, "--negative-prompt", "snow", "--guidance", 4)
    said = _run("wan", *asked, "--output", tmp_path / "out.png")
    assert said["output"] == [str(tmp_path / "out" / f"000{n}.png") for n in range(1, 6)]
    for path in said["output"]:
        with Image.open(path) as frame:
            assert frame.size == (32, 32)
    said = _run("wan", *asked, "--output", tmp_path / "out.mp4")
    assert b"ftyp" in (tmp_path / "out.mp4").read_bytes()[:32]
    assert said["models"]["transformer"]["num_steps"] == 4  # with the prompt and without, twice


def test_an_image_begins_a_video(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "first.png")
    asked = ("--frames", 5, "--image", tmp_path / "first.png", "--output", tmp_path / "out.png")
    assert len(_run("wan_i2v", *asked)["output"]) == 5
    assert "begins with an image" in _refuse("wan_i2v", *ASKED, *LINE)


def test_a_preview_stands_beside_the_picture(tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    out = _run("flux", "--output", tmp_path / "out.png", "--preview", preview)["output"]
    with Image.open(preview) as shown, Image.open(out[0]) as picture:
        assert shown.width == shown.height == 256
        assert picture.size == (32, 32)
    without = _run("flux", "--output", tmp_path / "without.png")["output"]
    assert Image.open(without[0]).tobytes() == Image.open(out[0]).tobytes()


def test_a_person_reads_a_plan_then_a_table(tmp_path: Path) -> None:
    path, out = tiny.pipeline("flux"), tmp_path / "out.png"
    done = invoke("run", path, *ASKED, *LINE, "--explain", "--output", out)
    assert done.code == 0
    plan, _, report = done.out.partition("\nsaved ")
    assert plan.count("component ") == plan.count("allocation ") == 4
    for row in (
        "models",
        "peak weight bytes",
        "ready after",
        "each step",
        "stalled",
        "transformer",
    ):
        assert f"\n{row}" in report
    assert "20.0 MiB disk" in report.replace("\n", "")


def test_lines_files_and_loras_go_to_the_models_they_name(tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out.png")
    without = _run("flux", *out), Image.open(tmp_path / "out.png").tobytes()
    target = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{target}.lora_A.weight": torch.ones(4, 256)}
    save_file(
        tensors | {f"{target}.lora_B.weight": torch.ones(256, 4)}, tmp_path / "style.safetensors"
    )
    _run("flux", *out, "--lora", f"{tmp_path / 'style.safetensors'}:0.5")
    assert Image.open(tmp_path / "out.png").tobytes() != without[1]
    _run("flux", *out, "--lora", f"transformer={tmp_path / 'style.safetensors'}:0")
    assert Image.open(tmp_path / "out.png").tobytes() == without[1]
    said = _run("flux", *out, "--component", "text_encoder_2=cpu,0b;disk,*")
    assert said["models"]["text_encoder_2"]["bytes_by_tier"]["cpu"] == 0
    convert(tiny.pipeline("flux") / "transformer", tmp_path / "t.gguf", "Q8_0")
    said = _run("flux", *out, "--file", f"transformer={tmp_path / 't.gguf'}")
    assert said["models"]["transformer"]["model_bytes"] < 10 << 20


def test_what_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    asked = ("--prompt", "a fox")
    assert "--prompt" in _refuse("flux")
    assert "not a width and a height" in _refuse("flux", *asked, "--size", "big")
    assert "neither a picture nor a video" in _refuse("flux", *asked, "--output", "out.txt")
    missing = ("--output", tmp_path / "no" / "out.png")
    assert "no such folder" in _refuse("flux", *asked, *missing)
    missing = ("--preview", tmp_path / "no" / "preview.png")
    assert "no such folder" in _refuse("flux", *asked, *missing)
    assert "--preview preview.jpg is not a PNG" in _refuse(
        "flux", *asked, "--preview", "preview.jpg"
    )
    assert "no such file" in _refuse("wan_i2v", *asked, "--image", tmp_path / "no.png")
    assert "is not NAME=VALUE" in _refuse("flux", *asked, "--component", "vae")
    assert "--temperature is for a single model" in _refuse("flux", *asked, "--temperature", 1)
    llama = tiny_llama(tmp_path / "llama")
    err = invoke("run", llama, *asked, "--steps", 4).err
    assert "--steps is for a pipeline" in err


def test_what_a_pipeline_does_not_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    save_file({"x.lora_A.weight": torch.ones(4, 256)}, tmp_path / "other.safetensors")
    for kind, option, problem in (
        ("flux", ("--size", "33x32"), "makes multiples of 4\n  try: --size 32x32"),
        ("flux", ("--size", "99999x32"), "makes multiples of 4\n  try: --size 99996x32"),
        ("flux", ("--frames", 5), "takes no num_frames\n  try: the same without --frames"),
        ("flux", ("--output", tmp_path / "out.mp4"), "one picture is no video"),
        ("flux", ("--component", "unet=cpu,*"), "has no model 'unet'"),
        ("flux", ("--file", f"unet={tmp_path / 'other.safetensors'}"), "has no model 'unet'"),
        ("flux", ("--lora", "unet=style.safetensors"), "there is no model 'unet'"),
        ("flux", ("--lora", tmp_path / "other.safetensors"), "other.safetensors"),
        ("wan_i2v", ("--image", tmp_path / "text.png"), "cannot be read as an image"),
        ("wan", ("--frames", 5, "--image", tmp_path / "text.png"), "image"),
    ):
        err = _refuse(kind, *ASKED, *LINE, *option)
        assert problem in err
        assert "\n  try: " in err


def test_a_video_needs_what_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distorch.cli.picture.find_spec", lambda _name: None)
    err = _refuse("wan", *ASKED, "--output", "out.mp4")
    assert 'pip install "distorch[video]"' in err


def test_a_transformer_alone_draws_nothing() -> None:
    alone = tiny.pipeline("flux") / "transformer"
    done = invoke("run", alone, "--prompt", "a fox", *LINE)
    assert done.code == 2
    assert "FluxTransformer2DModel generates no text" in done.err
    assert f"--file transformer={alone}" in done.err
