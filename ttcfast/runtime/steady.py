"""Files for native libraries that crash on a failed write: the first error is kept and raised at the end."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any


class SteadyFile:
    """A binary file whose writes never fail. After the first error, kept in ``error``, nothing more is written."""

    def __init__(self, file: IO[bytes] | io.RawIOBase) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        with self._kept():
            while self.error is None and len(left):
                left = left[self._file.write(left) :]  # a file without a buffer may write a part, where the disk ends
        return size

    def truncate(self, size: int | None = None) -> int:
        with self._kept():
            if self.error is None:
                self._file.truncate(size)
        return self.tell() if size is None else size

    def flush(self) -> None:
        with self._kept():
            self._file.flush()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)  # h5py recognises a file by this method, and reads by the next

    def readinto(self, memory: Any) -> int:
        """Read; parts that could not be written read as zeros."""
        view = memoryview(memory).cast("B")
        found = self._file.readinto(view)  # type: ignore[union-attr]
        if self.error is not None:
            view[found:] = bytes(len(view) - found)
            return len(view)
        return found

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


@contextlib.contextmanager
def steady(file: IO[bytes] | io.RawIOBase) -> Iterator[SteadyFile]:
    """Yield ``file`` for a library that must not see disk errors; the first error is raised when the block ends."""
    held = SteadyFile(file)
    try:
        yield held
    except Exception as error:
        if held.error is not None:
            raise held.error from error
        raise
    if held.error is not None:
        raise held.error
