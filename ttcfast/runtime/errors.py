"""Errors that a user can fix. The command line prints their message as one line and exits with their status."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator

# Messages of torch (CPU, CUDA), HDF5 and the system, whose exception types do not tell.
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|memory allocation failed|Cannot allocate memory"
    r"|Storage size calculation overflowed|too large to convert to C s",
    re.IGNORECASE,
)
# Message of the interpreter if a C function failed without memory left to create its exception.
_NO_REASON = re.compile(r"error return without exception set|NULL without setting an exception")


class UserError(Exception):
    """Base of the errors whose message alone tells the user what was given, what was expected and what to do."""

    status = 1
    """Exit status of a command that ends with this error: 1 failed while running, 2 bad arguments."""


class ArgumentError(UserError, ValueError):
    """A command, a configuration key or a value that cannot be used."""

    status = 2


class DataError(UserError):
    """A data file that is missing, damaged or of another layout."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another architecture."""


class OutputError(UserError, OSError):
    """A folder or file that cannot be written: no permission, a full disk, a file where a folder should be."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class MissingPackageError(UserError, ImportError):
    """An optional package that was requested and cannot be imported."""

    @classmethod
    def of(cls, what: str, package: str, extra: str, cause: ImportError) -> MissingPackageError:
        """Return the error for ``what`` (in the user's words), naming the package, the reason and the pip extra that provides it."""
        return cls(f"{what} needs the package {package}, which cannot be imported ({cause}); pip install 'ttcfast[{extra}]' brings it")


class OutOfMemoryError(UserError, MemoryError):
    """The machine, its GPU or a limit set on the process has no memory left."""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, SystemError) and _NO_REASON.search(str(error)):
        return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return isinstance(error, MemoryError) or _MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Convert errors for lack of memory within the block to ``OutOfMemoryError``, which says what to reduce.

    A ``MemoryError`` has no text, and a reader would report a file that does not fit as damaged.
    """
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not _is_of_memory(found):
            found = found.__cause__ or found.__context__
        if found is None or isinstance(error, OutOfMemoryError):
            raise
        said = next((line.strip() for line in str(found).splitlines() if _MEMORY.search(line)), "")
        raise OutOfMemoryError(
            f"out of memory{f' ({said})' if said else ''}; lower what is held at once (batch, per_file, grid, data.n, ttc.chunk_size, "
            "ttc.branching_factor, builder.memory_budget: those that the command has), or raise the limit (ulimit -v, the container's)"
        ) from error
