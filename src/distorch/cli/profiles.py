"""Profiles of models, kept: the first takes seconds and torch, the next reads a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

from distorch.cli.output import Bar
from distorch.errors import FormatError
from distorch.files import replacing
from distorch.plan.cost import Profile
from distorch.plan.storage import format_named

__all__ = ["model_profile"]

_SAID_BY: Final = ("distorch", "torch", "diffusers", "transformers")


def model_profile(
    name: str,
    *,
    size: str | None = None,
    frames: int | None = None,
    tokens: int | None = None,
    batch: int = 1,
    format: str = "bf16",  # noqa: A002  what users call it
    folder: Path | None = None,
) -> Profile:
    """Return the profile of a model, from ``folder`` if it was made before.

    The folder is in the user's cache, unless it is given.

    Arguments and errors are those of `distorch.integrations.families.profile_family`. A kept
    profile is found by all of them, by what a directory's configuration says, and by the versions
    of the packages that made it; torch is imported only where there is none. A damaged one is made
    again, and one that cannot be kept is returned all the same.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     profile = model_profile("wan-14b", format="Q4_K", folder=Path(folder))
    >>> f"{profile.model_bytes / 1e9:.1f} GB, {profile.total_flops / 1e12:.0f} TFLOP"
    '8.1 GB, 1678 TFLOP'
    """
    key = _key(name, [size, frames, tokens, batch, format_named(format).name])
    path = (folder or user_cache_path("distorch") / "profiles") / f"{key}.json"
    with contextlib.suppress(OSError, FormatError, UnicodeDecodeError):
        return Profile.from_json(path.read_text(encoding="utf-8"))
    with Bar() as bar:
        bar.begin(f"profiling {name}")
        from distorch.integrations.families import profile_family

        profile = profile_family(
            name, size=size, frames=frames, tokens=tokens, batch=batch, format=format
        )
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(profile.to_json().encode())
    return profile


def _key(name: str, asked: Sequence[object]) -> str:
    """All that a profile depends on, as a name for a file."""
    said = [
        name,
        *asked,
        *[_version(package) for package in _SAID_BY],
        *_configurations(Path(name)),
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def _configurations(path: Path) -> list[str]:
    """What the configuration in a directory says; nothing for a name."""
    found = []
    for place in (path, path / "transformer"):
        with contextlib.suppress(OSError, ValueError):
            found.append(hashlib.sha256((place / "config.json").read_bytes()).hexdigest())
    return found


def _version(package: str) -> str:
    """Return the installed version without importing the package; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
