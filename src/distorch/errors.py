"""The error tree. Every error says what was asked, what was found, and what to do.

    DistorchError
    ├── AllocationError    (ValueError)    an allocation line cannot be read, or does not fit
    ├── MachineError       (LookupError)   a device or machine that is not there
    ├── FormatError        (ValueError)    a file is not what it should be
    ├── ModelError         (ValueError)    a model cannot be built or distributed
    ├── StorageError       (OSError)       a file cannot be found, read or written
    ├── MissingExtraError  (ImportError)   an optional package is not installed
    └── ExecutorError      (RuntimeError)  the machinery failed while a model was running

``exit_code`` is what the command line ends with: 2 for bad input, 1 for a fault.
"""

from __future__ import annotations

__all__ = [
    "AllocationError",
    "DistorchError",
    "ExecutorError",
    "FormatError",
    "MachineError",
    "MissingExtraError",
    "ModelError",
    "StorageError",
    "is_out_of_memory",
    "one_line",
]


_SHOWN_CHARACTERS = 300  # of what a library says: it may print a whole model


class DistorchError(Exception):
    """Base of every error DisTorch raises.

    ``problem`` is what was asked and what was found; ``hint`` is what to do, with a line that
    would work where there is one.

    >>> print(DistorchError("the file is empty", hint="download it again"))
    the file is empty
      try: download it again
    """

    exit_code = 2

    def __init__(self, problem: str, *, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}\n  try: {self.hint}" if self.hint else self.problem


class AllocationError(DistorchError, ValueError):
    """An allocation line cannot be read, or asks for what the machine does not have.

    With ``text`` and ``position``, the message shows the line and a caret under the place:

    >>> print(AllocationError("unknown unit 'gbb'", text="cuda:0,2gbb", position=8, length=3))
    cuda:0,2gbb
            ^^^ unknown unit 'gbb'
    """

    def __init__(
        self, problem: str, *, hint: str = "", text: str = "", position: int = 0, length: int = 1
    ) -> None:
        super().__init__(problem, hint=hint)
        self.text = text
        self.position = position
        self.length = length

    def __str__(self) -> str:
        message = super().__str__()
        if not self.text:
            return message
        return f"{self.text}\n{' ' * self.position}{'^' * max(1, self.length)} {message}"


class MachineError(DistorchError, LookupError):
    """A device that this machine does not have, or a machine nobody described."""


class FormatError(DistorchError, ValueError):
    """A file is not what its name or its header says: wrong magic, sizes or offsets."""


class ModelError(DistorchError, ValueError):
    """A model cannot be built from a checkpoint, or cannot be distributed as asked."""


class StorageError(DistorchError, OSError):
    """A file cannot be found, read or written: missing, a directory, a full disk."""


class MissingExtraError(DistorchError, ImportError):
    """An optional package is not installed; the hint is the line that installs it."""


class ExecutorError(DistorchError, RuntimeError):
    """The machinery failed while a model was running: a reader thread, a closed handle."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that memory is full.

    torch has a type for it on accelerators, but for the CPU only a text.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
    (True, False)
    """
    kind = type(error).__name__
    return kind in {"MemoryError", "OutOfMemoryError"} or "DefaultCPUAllocator" in str(error)


def one_line(error: BaseException) -> str:
    r"""Return what an error says, in one short line; its type if it says nothing.

    >>> one_line(RuntimeError("shapes\n  differ")), one_line(MemoryError())
    ('shapes differ', 'MemoryError')
    """
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS] or type(error).__name__
