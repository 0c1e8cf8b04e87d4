"""``distorch plan`` of a model by name on a machine by name: an answer from nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distorch import Machine, Plan
from distorch.plan.blocks import Block, Part
from distorch.plan.plan import Placement, Ring
from tests.cli.make import environment, invoke
from tests.formats.make import write_gguf

WAN = ("wan-14b", "--size", "832x480", "--frames", "17", "--format", "bf16")
KEYS = (
    "model_bytes",
    "flops",
    "predicted_seconds",
    "bound_seconds",
    "limited_by",
    "resident_bytes",
    "streamed_bytes_by_link",
    "host_ram_bytes",
    "activation_bytes",
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("diffusers")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A machine that is too small for most."""
    text = Machine.load("rtx4070-12gb").to_toml()
    path = tmp_path / "tiny.toml"
    path.write_text(text.replace("free_gib = 24.0", "free_gib = 4.0").replace("1000.0", "1.0"))
    return path


def test_the_first_five_lines_are_the_answer() -> None:
    done = invoke("plan", *WAN, "--machine", "rtx4070-12gb")
    assert done.code == 0, done.err
    names = [line for line in done.out.splitlines() if not line.startswith(" ")]
    wanted = ("fits rtx4070-12gb", "a step takes", "limited by", "host RAM needed", "faster with")
    for name, line in zip(wanted, names, strict=False):
        assert line.startswith(name)


def test_the_json_has_every_number_and_the_plan() -> None:
    done = invoke("plan", *WAN, "--machine", "rtx4090-24gb", "--json")
    found = json.loads(done.out)
    assert set(KEYS) <= set(found)
    assert found["predicted_seconds"] >= found["bound_seconds"] > 0
    assert found["flops"] == pytest.approx(242e12, rel=0.01)
    plan = Plan.from_json(json.dumps(found["plan"]))
    assert plan.bytes_by_tier["cuda:0"] == found["resident_bytes"]
    assert plan.prediction is not None
    assert plan.prediction.streamed_bytes_by_link == found["streamed_bytes_by_link"]


def test_a_known_profile_answers_without_torch() -> None:
    invoke("plan", *WAN, "--machine", "rtx4070-12gb")
    code = (
        "import sys; from distorch.cli import app; sys.argv[1:] = sys.argv[1:]\n"
        "try: app()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "plan", *WAN, "--machine", "rtx4070-12gb"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    assert ran.returncode == 0, ran.stderr


def test_a_machine_that_is_too_small_says_what_would_fit(tiny: Path) -> None:
    done = invoke("plan", *WAN, "--machine", str(tiny))
    assert done.code == 2
    assert "needs 26." in done.err
    assert "--format" in done.err
    name = done.err.partition("--format ")[2].partition(":")[0]
    again = invoke("plan", *WAN[:-1], name, "--machine", str(tiny))
    assert again.code == 0, again.err


def test_a_line_of_the_users_own_gets_a_line_that_works() -> None:
    for option, value, hint in (
        ("--allocation", "cuda:0,30gb;cpu,*", "cuda:0,"),
        ("--ring", "10mb", "ring="),
    ):
        done = invoke("plan", *WAN, "--machine", "rtx4070-12gb", option, value)
        assert done.code == 2
        assert hint in done.err.partition("try:")[2]
    assert invoke("plan", "flux.1-dev", "--size", "9" * 5000 + "x16").code == 2


def test_an_unknown_model_or_machine_is_one_clear_line() -> None:
    for arguments in (("wan-14c",), (*WAN, "--machine", "rtx4070-13gb"), ()):
        done = invoke("plan", *arguments)
        assert done.code == 2, arguments
        assert "Traceback" not in done.err
        assert "try:" in done.err or "hint" in done.err


def test_a_checkpoint_alone_is_predicted_on_a_machine(tmp_path: Path) -> None:
    layers = {f"blk.{layer}.ffn_up.weight": ("Q8_0", (2048, 1024)) for layer in range(12)}
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors={"output_norm.weight": ("F32", (1024,)), **layers})
    found = {}
    for tokens in ("1", "100000"):
        arguments = ("plan", "--file", str(path), "--machine", "rtx4070-12gb", "--tokens", tokens)
        done = invoke(*arguments, "--allocation", "cuda:0,4mb;cpu,*", "--json")
        assert done.code == 0, done.err
        found[tokens] = json.loads(done.out)
    assert found["1"]["limited_by"] != "compute"
    assert found["100000"]["limited_by"] == "compute"
    assert found["1"]["flops"] == 12 * 2 * 2048 * 1024


def test_a_difference_names_what_moved(tmp_path: Path) -> None:
    def save(name: str, tiers: tuple[str, ...]) -> str:
        parts = [Part(tensor=f"w{i}", dtype="U8", shape=(64,), nbytes=64) for i in range(3)]
        placements = tuple(
            Placement(
                block=Block(name=f"block{number}", parts=(part,), module=None),
                tier=tier,
                kind="resident" if tier == "cpu" else "streamed",
            )
            for number, (part, tier) in enumerate(zip(parts, tiers, strict=True))
        )
        ring = Ring(num_slots=2, slot_bytes=placements[0].block.slot_bytes)
        plan = Plan(compute="cpu", allocation="cpu,64b;disk,*", placements=placements, ring=ring)
        path = tmp_path / name
        path.write_text(plan.to_json())
        return str(path)

    one, other = save("a.json", ("cpu", "disk", "disk")), save("b.json", ("cpu", "cpu", "disk"))
    done = invoke("plan", "--diff", one, other)
    assert done.code == 0, done.err
    assert "block1" in done.out
    assert "block0" not in done.out
    assert "block2" not in done.out
    broken = tmp_path / "c.json"
    broken.write_text("{}")
    assert invoke("plan", "--diff", one, str(broken)).code == 2
    assert invoke("plan", "--diff", one, str(tmp_path / "none.json")).code == 2


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_a_plan_is_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    assert invoke("plan", *WAN, "--machine", "rtx4070-12gb", "--plot", path).code == 0
    assert path.stat().st_size > 1000
    done = invoke("plan", *WAN, "--machine", "rtx4070-12gb", "--plot", tmp_path / "plan.doc")
    assert done.code == 2
    assert ".png" in done.err


def test_help_has_examples() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "distorch", "plan", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert "--machine" in ran.stdout
    assert "distorch plan wan-14b" in ran.stdout
