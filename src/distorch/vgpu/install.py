"""Give torch the device type ``vgpu``: once in a process, before anything uses it."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Final

from distorch.errors import DistorchError, MachineError
from distorch.vgpu.control import apply_spec
from distorch.vgpu.library import load, set_installed, why_not
from distorch.vgpu.spec import Spec

__all__ = ["autoload", "install", "is_installed", "why_not"]

_VARIABLE: Final = "DISTORCH_VGPU"
_specs: list[Spec] = []  # the one that is installed
_said: list[str] = []  # what autoload has complained of: torch may call it, and others


def is_installed() -> bool:
    """Whether this process has virtual GPUs.

    >>> is_installed() in {True, False}
    True
    """
    return bool(_specs)


def install(spec: str | None = None) -> None:
    """Build the virtual GPU, or find it built, and give torch its devices.

    The first build takes about 25 s and is kept in the user's cache. Calling again with the same
    line does nothing.

    Args:
        spec: The devices, as in ``"12gb,24gb@4gb/s"``; None takes ``DISTORCH_VGPU``.

    Raises:
        MachineError: the line cannot be read, another one is installed, there is no compiler, or
            torch has another backend of this kind.
        ExecutorError: it cannot be compiled.
    """
    line = spec if spec is not None else os.environ.get(_VARIABLE, "")
    if not line:
        problem = f"which virtual devices? no line is given, and {_VARIABLE} is not set"
        raise MachineError(problem, hint=f"{_VARIABLE}=12gb,24gb@4gb/s")
    wanted = Spec.parse(line)
    if _specs and _specs[0] == wanted:
        return
    if _specs:
        problem = f"{line!r} is asked, but this process has other virtual devices already"
        raise MachineError(
            problem, hint="one line per process; set_link and set_capacity change it"
        )
    _register(wanted)
    _specs.append(wanted)


def _register(spec: Spec) -> None:
    # Only now, since the virtual GPU is asked for.
    import torch  # noqa: PLC0415
    from torch.utils.backend_registration import (  # noqa: PLC0415
        generate_methods_for_privateuse1_backend,
        rename_privateuse1_backend,
    )

    from distorch.vgpu import torch_module  # noqa: PLC0415 (imports torch)

    taken = torch._C._get_privateuse1_backend_name()  # noqa: SLF001 (torch has no public name)
    if taken not in {"privateuseone", "vgpu"}:
        problem = f"torch has one place for such a backend, and {taken!r} has it"
        raise MachineError(problem, hint=f"start without {taken}")
    loaded = load()
    rename_privateuse1_backend("vgpu")
    torch._register_device_module("vgpu", torch_module)  # noqa: SLF001 (torch's door)
    generate_methods_for_privateuse1_backend()
    set_installed(loaded)
    loaded.vgpu_init(len(spec.devices))
    atexit.register(loaded.vgpu_shutdown)
    apply_spec(spec)


def autoload() -> None:
    """Install the devices of ``DISTORCH_VGPU`` when torch is imported; for its entry point.

    Without the variable nothing happens. It never raises: what went wrong is one line on stderr,
    said once.

    >>> autoload()
    """
    if not os.environ.get(_VARIABLE):
        return
    try:
        install()
    except (DistorchError, RuntimeError, OSError) as error:
        text = error.problem if isinstance(error, DistorchError) else str(error)
        line = text.splitlines()[0]
        if line not in _said:
            _said.append(line)
            print(f"distorch: no virtual GPU: {line}", file=sys.stderr)  # noqa: T201
