"""What the virtual GPU costs where nobody asks for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distorch import vgpu
from distorch.errors import MachineError


def test_importing_it_and_its_entry_point_load_no_torch() -> None:
    code = "import sys\nfrom distorch import vgpu\nvgpu.autoload()\nprint('torch' in sys.modules)"
    variables = {name: value for name, value in os.environ.items() if name != "DISTORCH_VGPU"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_without_devices_it_says_how_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTORCH_VGPU", raising=False)
    with pytest.raises(MachineError, match="which virtual devices"):
        vgpu.install()
    if vgpu.is_installed():
        return
    with pytest.raises(MachineError, match="not installed") as caught:
        vgpu.counters()
    assert "DISTORCH_VGPU=" in caught.value.hint


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert vgpu.why_not().startswith("there is no C++ compiler")
    assert "\n" not in vgpu.why_not()
