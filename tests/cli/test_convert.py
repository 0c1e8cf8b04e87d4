"""``distorch convert``: what it prints, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distorch.formats import open_checkpoint
from tests.cli.make import environment, invoke
from tests.convert.make import FLUX, flux, save


def test_a_table_says_what_was_stored_how(tmp_path: Path) -> None:
    source, out = save(tmp_path / "in.safetensors", flux()), tmp_path / "out.gguf"
    ended = invoke("convert", source, out, "--format", "q4_k")
    assert ended.code == 0
    rows = {line.split()[0]: line.split()[1] for line in ended.out.splitlines() if line}
    assert (rows["Q4_K"], rows["BF16"], rows["F32"]) == ("2", "2", "2")
    assert "of the architecture flux in" in ended.out
    assert "1 tensor not Q4_K" in ended.err


def test_json_is_one_object(tmp_path: Path) -> None:
    weights = flux(torch.float32)
    weights[FLUX][0, 0] = torch.nan
    source, out = save(tmp_path / "in.safetensors", weights), tmp_path / "out.gguf"
    ended = invoke("convert", source, out, "--format", "Q8_0", "--json")
    assert ended.json["nonfinite"] == {FLUX: 1}
    assert ended.json["written_bytes"] == out.stat().st_size
    assert f"warning: {FLUX}: 1 weights are NaN or infinite" in ended.err
    with open_checkpoint(out) as checkpoint:
        assert sum(row["num_tensors"] for row in ended.json["dtypes"].values()) == len(checkpoint)


def test_options_reach_the_file(tmp_path: Path) -> None:
    source, out = (
        save(tmp_path / "in.safetensors", {"w.a": torch.ones(64, 64)}),
        tmp_path / "o.gguf",
    )
    refused = invoke("convert", source, out, "--format", "Q8_0")
    assert refused.code == 2
    assert "--architecture" in refused.err
    more = ("--architecture", "wan", "--keep", "x", "--keep", "w.*")
    assert invoke("convert", source, out, "--format", "Q8_0", *more).code == 0
    with open_checkpoint(out) as checkpoint:
        assert checkpoint["w.a"].dtype == "F32"
        assert checkpoint.metadata["general.architecture"] == "wan"
    again = invoke("convert", source, out, "--format", "Q8_0", "--architecture", "wan")
    assert (again.code, "--overwrite" in again.err) == (2, True)
    assert invoke("convert", source, out, "--format", "Q8_0", *more, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("out", "form", "message"),
    [
        ("o.gguf", "fp8_e4m3fn", "GGUF file cannot hold"),
        ("o.safetensors", "Q4_K", "safetensors file cannot hold"),
        ("o.bin", "Q4_K", "neither"),
        ("o.gguf", "Q4_K_M", "no format of weights"),
        ("in.safetensors", "f16", "IN itself"),
        ("none/o.gguf", "Q8_0", "no folder"),
    ],
)
def test_bad_input_ends_with_2_and_a_line_that_works(
    out: str, form: str, message: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "in.safetensors", flux())
    ended = invoke("convert", source, tmp_path / out, "--format", form)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err
    assert "\n  try: " in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom distorch.cli import app\n"
        "try: app(['convert', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert "distorch convert flux1-dev.safetensors" in done.stdout
    assert done.stdout.endswith("False\n")
