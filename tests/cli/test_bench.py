"""``distorch bench``: a sweep predicted on any machine, and one measured on this."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from distorch.allocation import Allocation
from distorch.cli import bench as bench_module
from distorch.cli.sweep import lines_of
from distorch.machine import Compute, Link, Machine, Tier
from distorch.plan.blocks import Block, Part
from distorch.plan.cost import Profile
from tests.cli.make import invoke, tiny_llama

MIB = 1 << 20
POINT_KEYS = {
    "donor",
    "allocation",
    "offloaded_bytes",
    "seconds",
    "bound_seconds",
    "waited_share",
    "limited_by",
    "E",
}
KEYS = {
    "model",
    "machine",
    "compute",
    "measured",
    "model_bytes",
    "compute_seconds",
    "points",
    "skipped",
}
DONORS = {"cuda:1": (16 * MIB, 8e9), "cpu": (512 * MIB, 4e9), "disk": (512 * MIB, 1e9)}


def _machine(**free_bytes: int) -> Machine:
    rooms = {"cuda:0": free_bytes.get("card", 256 * MIB)}
    rooms |= {name: free_bytes.get(name, room) for name, (room, _) in DONORS.items()}
    return Machine(
        name="made up",
        tiers=tuple(
            Tier(name=n, capacity_bytes=room, free_bytes=room) for n, room in rooms.items()
        ),
        links=tuple(
            Link(source=name, target="cuda:0", bytes_per_second=speed)
            for name, (_, speed) in DONORS.items()
        ),
        computes=(Compute(device="cuda:0", flops_per_second={"F16": 1e12}, bytes_per_second=1e11),),
    )


def _profile(_name: str, **_asked: object) -> Profile:
    parts = [Part(tensor=f"w{i}", dtype="BF16", shape=(MIB // 2,), nbytes=MIB) for i in range(48)]
    blocks = tuple(Block(name=part.tensor, parts=(part,), module=part.tensor) for part in parts)
    return Profile(name="tiny", blocks=blocks, flops=(10**8,) * 48, activation_bytes=MIB)


@pytest.fixture
def machine_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench_module, "model_profile", _profile)
    path = tmp_path / "machine.toml"
    _machine().save(path)
    return path


def _swept(machine_file: Path, *more: object) -> dict[str, Any]:
    done = invoke("bench", "tiny", "--sweep", "--machine", machine_file, "--json", *more)
    assert (done.code, done.err) == (0, "")
    said = done.json
    assert isinstance(said, dict)
    assert set(said) == KEYS
    assert all(set(point) == POINT_KEYS for point in said["points"])
    return said


def test_the_sweep_goes_from_nothing_to_all_for_each_donor_and_all_together(
    machine_file: Path,
) -> None:
    said = _swept(machine_file, "--points", 5)
    by_donor: dict[str, list[dict[str, Any]]] = {}
    for point in said["points"]:
        by_donor.setdefault(point["donor"], []).append(point)
    assert list(by_donor) == ["cuda:1", "cpu", "disk", "cuda:1 + cpu + disk"]
    for donor in ("cpu", "disk", "cuda:1 + cpu + disk"):
        offloaded = [point["offloaded_bytes"] for point in by_donor[donor]]
        assert offloaded == sorted(offloaded)
        assert (offloaded[0], offloaded[-1], len(offloaded)) == (0, said["model_bytes"], 5)
    assert by_donor["disk"][-1]["seconds"] > by_donor["cpu"][-1]["seconds"]
    assert by_donor["cpu"][-1]["seconds"] > by_donor["cuda:1 + cpu + disk"][-1]["seconds"]


def test_every_point_is_at_or_above_its_bound_and_compute(machine_file: Path) -> None:
    said = _swept(machine_file)
    for point in said["points"]:
        assert point["seconds"] >= point["bound_seconds"] * 0.999_999
        assert point["bound_seconds"] >= said["compute_seconds"] * 0.999_999
        assert 0 < point["E"] <= 1
        assert 0 <= point["waited_share"] < 1


def test_what_does_not_fit_is_left_out_and_said(machine_file: Path) -> None:
    said = _swept(machine_file, "--points", 4)
    small = [point for point in said["points"] if point["donor"] == "cuda:1"]
    assert [point["offloaded_bytes"] // MIB for point in small] == [0, 16]
    assert any(line.startswith("cuda:1: 2 of 4 do not fit: ") for line in said["skipped"])


def test_nothing_fits_is_an_error_that_says_why(machine_file: Path) -> None:
    _machine(card=MIB, cpu=MIB, disk=MIB).save(machine_file)
    done = invoke("bench", "tiny", "--sweep", "--machine", machine_file)
    assert done.code == 2
    assert "no allocation of the sweep fits: " in done.err
    assert "try: " in done.err


def test_a_donor_without_a_link_is_left_out_and_said(machine_file: Path) -> None:
    machine_file.write_text(
        machine_file.read_text(encoding="utf-8")
        .replace('source = "disk"', 'source = "cuda:0"')
        .replace('source = "cuda:0", target = "cuda:0"', 'source = "cuda:0", target = "disk"'),
        encoding="utf-8",
    )
    said = _swept(machine_file)
    assert {point["donor"] for point in said["points"]} == {"cuda:1", "cpu", "cuda:1 + cpu"}
    assert any(line.startswith("disk: ") and "no link" in line for line in said["skipped"])


def test_without_sweep_it_is_the_one_step_of_auto(machine_file: Path) -> None:
    done = invoke("bench", "tiny", "--machine", machine_file, "--json")
    (point,) = done.json["points"]
    assert (done.code, point["donor"], point["allocation"]) == (0, "auto", "auto")


def test_the_table_has_a_row_for_each_point(machine_file: Path) -> None:
    done = invoke("bench", "tiny", "--sweep", "--points", 3, "--machine", machine_file)
    assert done.code == 0
    for word in (
        "tiny, 48.0 MiB",
        "made up, cuda:0 computes",
        "compute alone",
        "left out",
        "bound",
    ):
        assert word in done.out
    assert sum(line.startswith("disk ") for line in done.out.splitlines()) == 3


def test_the_chart_is_drawn(machine_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='needs pip install "distorch[plot]"')
    path = tmp_path / "sweep.svg"
    _swept(machine_file, "--points", 3, "--plot", path)
    text = path.read_text(encoding="utf-8")
    assert "tiny: what offloading costs" in text
    assert ">cuda:1 + cpu + disk<" in text


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(machine_file: Path) -> None:
    done = invoke("bench", "tiny", "--sweep", "--machine", machine_file, "--plot", "sweep.pdf")
    assert (done.code, done.out) == (2, "")
    assert "sweep.png" in done.err


def test_lines_deal_all_bytes_to_the_donors_that_have_room() -> None:
    donors = {"cuda:1": {"a": 8e9}, "cpu": {"b": 4e9}}
    lines = [
        line for donor, line in lines_of(donors, "cuda:0", _machine(), 48 * MIB, 2) if "+" in donor
    ]
    assert lines[0] == "cuda:0,50331648b;cpu,*"
    compute, full, rest = Allocation.parse(lines[1]).entries
    assert (compute.amount, rest.device, rest.rest) == (0, "cpu", True)
    assert 15 * MIB < full.amount <= 16 * MIB


def test_a_checkpoint_is_not_measured_on_another_machine(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    done = invoke("bench", path, "--machine", "rtx4070-12gb")
    assert done.code == 2
    assert "distorch plan" in done.err


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip('needs pip install "distorch[transformers]"')
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def test_a_checkpoint_is_measured_at_each_budget(llama: Path) -> None:
    done = invoke("bench", llama, "--sweep", "--points", 3, "--steps", 4, "--json")
    assert (done.code, done.err) == (0, "")
    said = done.json
    assert set(said) == KEYS
    assert said["measured"]
    assert [point["donor"] for point in said["points"]] == ["disk"] * 3
    offloaded = [point["offloaded_bytes"] for point in said["points"]]
    assert offloaded == sorted(offloaded)
    assert (offloaded[0], offloaded[-1]) == (0, said["model_bytes"])
    for point in said["points"]:
        assert point["seconds"] > 0
        assert point["bound_seconds"] >= said["compute_seconds"]
        assert 0 < point["E"] <= 1


def test_a_broken_checkpoint_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not it")
    done = invoke("bench", path)
    assert done.code == 2
    assert "model.gguf" in done.err
