"""The GPU benchmarks: mirrors are the models they say, and the command runs on a virtual card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "benchmarks" / "gpu" / "run.py"
OURS = {"ours", "ours, large ring", "ours, as shipped"}
PEERS = {"diffusers group offload", "diffusers model offload", "accelerate cpu_offload"}
PLAIN = {"copy at use", "one ahead", "one ahead, prefix stays"}

virtual = pytest.mark.skipif(
    not os.environ.get("DISTORCH_VGPU"), reason="needs virtual GPUs: DISTORCH_VGPU=2gb,2gb,2gb"
)

# What diffusers' classes have: billions of weights, TFLOPs of a pass, blocks of so many megabytes.
COUNTED: dict[str, tuple[str, dict[str, Any], float, float, dict[str, float]]] = {
    "flux": ("flux", {}, 11.90, 74.4, {"dual.0.": 680, "single.0.": 283}),
    "qwen 1328": ("qwen_image", {}, 20.43, 131.7, {"dual.0.": 680}),
    "qwen 1024": ("qwen_image", {"size": 1024}, 20.43, 70.6, {"dual.0.": 680}),
    "qwen 512": ("qwen_image", {"size": 512}, 20.43, 16.7, {"dual.0.": 680}),
    "wan 81": ("wan", {}, 14.29, 1678, {"blocks.0.": 703}),
    "wan 17": ("wan", {"frames": 17}, 14.29, 242, {"blocks.0.": 703}),
    "wan 720p": ("wan", {"size": (1280, 720)}, 14.29, 6523, {"blocks.0.": 703}),
    "70B": ("llama", {}, 70.55, 2 * 0.0695, {"layers.0.": 1711}),
    "70B of 32": ("llama", {"batch": 32}, 70.55, 2 * 32 * 0.0695, {"layers.0.": 1711}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_mirror_has_the_weights_and_the_products_of_its_model(name: str) -> None:
    function, options, billions, teraflops, blocks = COUNTED[name]
    shape = getattr(import_module("gpu.shapes"), function)(**options)
    with torch.device("meta"):
        module = shape.build()
    module.bfloat16()
    sizes = {key: value.numel() for key, value in module.named_parameters()}
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, rel=0.01)
    for prefix, megabytes in blocks.items():
        size = 2 * sum(size for key, size in sizes.items() if key.startswith(prefix))
        assert size / 1e6 == pytest.approx(megabytes, rel=0.01)
    inputs = {
        key: value.to("meta", torch.bfloat16 if value.is_floating_point() else value.dtype)
        for key, value in shape.inputs().items()
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    assert counter.get_total_flops() / 1e12 == pytest.approx(teraflops, rel=0.01)


def run(*arguments: str, line: str | None) -> subprocess.CompletedProcess[str]:
    """Run the command as users do, with virtual cards or with none."""
    environment = {key: value for key, value in os.environ.items() if key != "DISTORCH_VGPU"}
    environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT / "src")}
    if line is not None:
        environment["DISTORCH_VGPU"] = line
    return subprocess.run(
        [sys.executable, str(COMMAND), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


@pytest.mark.skipif(
    torch.accelerator.is_available() and not os.environ.get("DISTORCH_VGPU"),
    reason="there is a card, and it would be measured",
)
def test_without_a_card_it_is_skipped_in_a_line() -> None:
    done = run(line=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("skipped, no accelerator")
    assert len(done.stdout.splitlines()) == 1


def test_an_unknown_workload_is_refused() -> None:
    done = run("--only", "g1,g99", line=None)
    assert done.returncode == 2
    assert "'g99' is none of g1," in done.stderr


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = import_module("gpu.needs")
    monkeypatch.setattr(needs, "find_spec", lambda name: None if "_" in name else object())
    assert needs.missing() == ["tomli_w"]
    text = needs.explain(needs.missing())
    assert "missing: tomli_w, which is needed by distorch._machine_file" in text
    assert "--target deps tomli-w" in text


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All workloads, tiny, on a virtual card whose link is slow: it decides, as it should."""
    out = tmp_path_factory.mktemp("gpu") / "results.json"
    done = run("--scale", "tiny", "--device", "vgpu:0", "--out", str(out), line="1gb@200mb/s")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_the_headline_has_every_peer_under_the_cap() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("diffusers")
    workloads = import_module("gpu.workloads")
    scale, speeds = workloads.full(12.0), import_module("gpu.cases").Speeds()
    labels = {"g1", "g2", "g4 BF16"}
    found = [
        case
        for name in ("g1", "g2", "g4")
        for case in workloads.WORKLOADS[name].cases(scale, speeds, None)
        if case.label in labels
    ]
    assert {case.label for case in found} == labels
    for case in found:
        assert case.cap_bytes == 12e9
        assert {entry.name for entry in case.entries} >= {"ours", *PEERS}
        assert not any(entry.cap_bytes for entry in case.entries)


def test_a_cap_is_a_share_of_the_card_and_ends_with_its_block() -> None:
    asked: list[tuple[float, torch.device]] = []
    device: Any = object.__new__(import_module("gpu.device").Device)  # there is no such card here
    device.torch, device.kind, device.total_bytes = torch.device("cuda:0"), "cuda", 48 * 10**9
    device._module = SimpleNamespace(
        set_per_process_memory_fraction=lambda share, where: asked.append((share, where))
    )
    with device.cap(12 * 10**9):
        assert asked == [(0.25, device.torch)]
    assert asked[1:] == [(1.0, device.torch)]


@pytest.mark.vgpu
@pytest.mark.slow
@virtual
def test_the_whole_command_runs_and_every_scheme_of_ours_keeps_the_bits(
    results: dict[str, Any],
) -> None:
    cases = results["cases"]
    expected = {"g1", "g2", "g3", "g5 batch 1", "g5 batch 4", "g6", "g7"}
    expected |= {f"g4 {form}" for form in ("BF16", "F8_E4M3", "Q8_0", "Q4_K")}
    assert expected <= set(cases)
    for label in expected:
        case = cases[label]
        assert case["pinned"], label
        for name, row in case["contenders"].items():
            if name in OURS | PLAIN or label in {"g6", "g7"}:
                assert "failed" not in row, (label, name, row)
                assert "cut_off" not in row, (label, name)
                if name != "resident":
                    assert row["bits_equal"] is True, (label, name)
                    assert row["finite"], (label, name)
    assert set(cases["g1"]["contenders"]) >= {"resident", *OURS, *PLAIN}
    for name in PEERS & set(cases["g1"]["contenders"]):
        failed = cases["g1"]["contenders"][name].get("failed", "")
        assert ("out of memory" in failed) == (name == "diffusers model offload"), failed


@pytest.mark.vgpu
@pytest.mark.slow
@virtual
def test_the_results_have_what_is_promised(results: dict[str, Any]) -> None:
    for key in ("device", "torch", "commit", "cores", "host_bytes", "device_bytes"):
        assert results["hardware"][key], key
    assert set(results["links"]) == {
        "pinning",
        "pinned to device",
        "beside a matrix product",
        "device to pinned",
        "pageable to device",
        "disk",
    }
    assert not [found for found in results["links"].values() if "failed" in found]
    for label, case in results["cases"].items():
        for name, row in case["contenders"].items():
            if name == "resident" or "failed" in row:
                continue
            where = label, name
            assert row["left_bytes"] == 0, where
            assert row["seconds"] > 0, where
            assert len(row["passes"]) == 3, where
            assert row["streamed_bytes"] > 0, where
            assert row["peak_bytes"] <= row["cap_bytes"], where
            assert row["peak_reserved_bytes"] <= row["cap_bytes"], where
            bound = row["bound_seconds"]
            assert row["E"] == pytest.approx(bound / row["seconds"]), where
            assert row["E"] > 0, where
            if row["bound_by"] == "link":  # a shared processor's own speed is another each minute
                assert row["E"] <= 1.05, where


@pytest.mark.vgpu
@virtual
def test_the_kernel_table_says_who_decodes_and_how_far_from_the_ideal_time(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = "--scale", "tiny", "--device", "vgpu:0", "--only", "kernels", "--out", str(out)
    done = run(*arguments, line="1gb")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    found = results["kernels"]
    assert not results["cases"]
    assert list(found["decoding"]) == ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "F8_E4M3", "F8_E5M2"]
    for name, row in found["decoding"].items():
        ours = [who for who in row if who.startswith("ours: ")]
        assert len(ours) == 1, name
        for who in (*ours, "torch"):
            assert row[who]["bits_equal"], (name, who)
            ideal = found["memory"] / row[who]["bytes_per_second"]
            assert row[who]["times_ideal"] == pytest.approx(ideal)
        assert set(found["products"][name]) == {"1", "4", "16"}
        assert all(times["decoded"] > 0 for times in found["products"][name].values())
    assert "Packed weights to bfloat16" in done.stdout


@pytest.mark.vgpu
@pytest.mark.slow
@virtual
def test_a_time_that_is_up_cuts_cleanly(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    arguments = "--scale", "tiny", "--device", "vgpu:0", "--only", "g2,g3", "--minutes", "0.001"
    done = run(*arguments, "--out", str(out), line="1gb")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert cases
    assert all("the time was up" in json.dumps(case) for case in cases.values())


@pytest.mark.vgpu
@virtual
def test_a_model_that_the_host_has_no_memory_for_says_which_option_allows_more(
    tmp_path: Path,
) -> None:
    out = tmp_path / "results.json"
    arguments = "--scale", "tiny", "--device", "vgpu:0", "--only", "g3,g2", "--host-gb", "0.004"
    done = run(*arguments, "--out", str(out), line="1gb")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    assert "disk" not in results["links"]  # none of the two asks for it
    assert not [found for found in results["links"].values() if "failed" in found]
    assert list(results["cases"]) == ["g2", "g3"]
    assert all("--host-gb allows more" in case["failed"] for case in results["cases"].values())
