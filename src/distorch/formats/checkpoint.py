"""A checkpoint: the tensors of a model on disk, as a Mapping of name -> TensorInfo.

Opening one reads headers only. ``view`` maps a file when a weight of it is first asked for; the
weights are never copied here.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, Self

from distorch.errors import FormatError, StorageError
from distorch.formats import gguf, safetensors
from distorch.formats.dtypes import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint"]

_WELL_KNOWN_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_SNIFF_BYTES: Final = 64
_FOREIGN: Final = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "git lfs pull"),
    (b"<", "a web page, not a checkpoint", "download the file itself; a gated one needs a login"),
    (b"PK\x03\x04", "a torch.save archive, which may run code", "use a safetensors version of it"),
    (b"\x80", "a pickle, which may run code when opened", "use a safetensors version of it"),
)


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of one model on disk, by name, in the order of the header.

    ``path`` is the file or the index that was read, ``metadata`` what its header says besides the
    tensors, ``nbytes`` the bytes of all tensors. A GGUF array in ``metadata`` is decoded at each
    access: keep what you need more than once. Use it in a ``with`` statement, or ``close()`` it.

    >>> info = TensorInfo("w", "F32", (2,), 0, 8, Path("tiny.safetensors"))
    >>> checkpoint = Checkpoint(Path("tiny.safetensors"), "safetensors", {}, {"w": info})
    >>> checkpoint, checkpoint["w"].shape
    (<Checkpoint tiny.safetensors: 1 tensors, 8 bytes>, (2,))
    """

    def __init__(
        self,
        path: Path,
        format: Literal["gguf", "safetensors"],  # noqa: A002  (it sets the attribute of that name)
        metadata: Mapping[str, object],
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.path = path
        self.format = format
        self.metadata = metadata
        self.nbytes = sum(info.nbytes for info in tensors.values())
        self._tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}
        self._closed = False

    def view(self, name: str) -> memoryview:
        """Return the stored bytes of a tensor: read-only, mapped, nothing is read until it is used.

        Raises KeyError for an unknown name, StorageError when the file is gone, has shrunk since
        it was opened, or the checkpoint is closed. ``open_checkpoint`` shows an example.
        """
        info = self[name]
        if self._closed:
            raise StorageError(f"{self.path} is closed", hint="view its tensors before close()")
        if not info.nbytes:
            return memoryview(b"")
        end = info.offset + info.nbytes
        if info.path not in self._maps:
            with _naming(info.path):
                self._maps[info.path] = _map(info.path)
        mapped = self._maps[info.path]
        if end > len(mapped):
            raise StorageError(
                f"{info.path} has shrunk since it was opened", hint="open the checkpoint again"
            )
        return memoryview(mapped)[info.offset : end]

    def close(self) -> None:
        """Release the maps and their file handles; what the header said stays readable.

        A view that is still in use keeps its own map alive, until that view goes.
        """
        self._closed = True
        self._maps.clear()  # each map closes with its last reference: a view's, or this one

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {len(self)} tensors, {self.nbytes} bytes>"


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Describe the checkpoint at ``path``: a GGUF or safetensors file, an index, or a directory.

    A directory holds ``model.safetensors``, ``diffusion_pytorch_model.safetensors``, the index of
    either, or exactly one ``.gguf`` or ``.safetensors`` file. What a file is, its first bytes
    decide, not its name. Raises StorageError when there is nothing to read, FormatError when what
    is there is not a checkpoint or contradicts itself.

    >>> import tempfile
    >>> header = b'{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = Path(directory, "model.safetensors")
    ...     _ = file.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    ...     with open_checkpoint(directory) as checkpoint:
    ...         checkpoint["w"].shape, bytes(checkpoint.view("w"))
    ((3,), b'abc')
    """
    path = Path(path)
    with _naming(path):
        path = _locate(path)
    with _naming(path):
        with path.open("rb") as file:
            head = file.read(_SNIFF_BYTES)
        if head.startswith(b"GGUF"):
            return Checkpoint(path, "gguf", *gguf.read_header(path))
        # A safetensors file is a u64 below 2**56 and a '{'; no text has a NUL before its brace.
        if head[7:9] == b"\0{":
            return Checkpoint(path, "safetensors", *safetensors.read_header(path))
        if head.lstrip().startswith(b"{"):
            return Checkpoint(path, "safetensors", *safetensors.read_index(path))
        raise _foreign(head)


def _locate(path: Path) -> Path:
    """Return the file to read for a path that may be a directory."""
    if path.is_file():
        return path
    if not path.exists():
        raise StorageError("no such file or directory", hint="check the path for a typo")
    if not path.is_dir():  # opening a pipe would wait for its other end
        raise StorageError("not a regular file", hint="copy it to a file first")
    for name in _WELL_KNOWN_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in {".gguf", ".safetensors"})
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise StorageError(f"holds several checkpoints: {names:.300}", hint=f"name one: {found[0]}")
    raise StorageError(
        "holds no checkpoint",
        hint=f"name a .gguf or .safetensors file, or a directory with {_WELL_KNOWN_NAMES[0]}",
    )


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # which mmap refuses with a ValueError
            raise StorageError("the file is empty now", hint="download it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _foreign(head: bytes) -> FormatError:
    """Say what a file is that is no checkpoint."""
    if not head:
        return FormatError("the file is empty")
    for magic, problem, hint in _FOREIGN:
        if head.startswith(magic):
            return FormatError(problem, hint=hint)
    return FormatError(
        f"neither GGUF nor safetensors: it starts with {head[:12]!r}",
        hint="name a .gguf file, a .safetensors file, or its .index.json",
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name in front of an error, and turn an OSError into a StorageError."""
    try:
        yield
    except FormatError as error:
        hint = error.hint or "download the file again: it is damaged or incomplete"
        raise FormatError(f"{path}: {error.problem}", hint=hint) from error
    except StorageError as error:
        raise StorageError(f"{path}: {error.problem}", hint=error.hint) from error
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: {error.strerror or error}",
            hint="check the file's permissions and its disk",
        ) from error
