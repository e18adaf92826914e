"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .errors import DataError, OutputError, UserError

# What the disk or the file system does to a writer. Other OSErrors inside a writing block (a missing input, say) are not ours to rename.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: str | os.PathLike[str], what: str, missing: str, error: type[UserError] = DataError, *, told: str = "") -> Path:
    """The absolute path of a regular file (or of a link to one), asked before anything opens it: a pipe would be waited for without end.

    Args:
        path: the file. what: what it should be, for the message: ``"data file"``.
        missing: what to do where it is not there.
        error: what to raise.
        told: where the path comes from, for the message: ``" (named by list.txt)"``.

    Raises:
        DataError, or ``error``: it is missing, or a folder, named pipe, socket or device.
    """
    try:
        mode = os.stat(path).st_mode
    except PermissionError as denied:
        raise error(f"{what} {path}{told} cannot be read ({denied.strerror}); make it and its folders readable") from denied
    except (OSError, ValueError) as absent:  # ValueError: a name that no file can have
        raise error(f"{what} {path}{told} does not exist; {missing}") from absent
    if not stat.S_ISREG(mode):
        raise error(f"{what} {path}{told} is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}; give a regular file")
    return Path(os.path.abspath(path))


def entries(folder: str | os.PathLike[str], *suffixes: str) -> list[Path]:
    """What lies in ``folder`` under a name that ends in one of ``suffixes`` (``".hdf5"``), upper or lower case, sorted; nothing hidden.

    A killed writer leaves a hidden partial file. An empty list where there is no such folder.
    """
    place = Path(folder)
    if not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a writer that wants a path (h5py, matplotlib) a temporary one beside ``path``; rename it into place at the end.

    The temporary name keeps the suffix, since some writers read the format from it. If the block raises, the temporary file is
    removed and whatever was at ``path`` before is still there. A device such as ``/dev/full`` is handed through as it is.

    Raises:
        OutputError: the folder cannot be written, the disk is full, ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))  # through a link, so that the link stays a link
    if _is_device(target):
        with disk_errors(target):
            yield target
        return
    output_folder(target.parent)
    if target.is_dir():
        raise OutputError(f"cannot write {target}: it is a folder; give the name of a file")
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        with disk_errors(target):
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, target)
            _sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open ``path`` for writing so that it appears whole or not at all.

    Args:
        path: the file; its folder is made when missing.
        mode: ``"w"`` (UTF-8 text, ``\\n`` line ends) or ``"wb"``.

    Raises:
        OutputError: the folder cannot be written, the disk is full, ``path`` is a folder.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}; it must be 'w' or 'wb'")
    text: dict[str, str] = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    with atomic_path(path) as place, open(place, mode, **text) as file:  # type: ignore[call-overload]
        yield file
        file.flush()


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder ``path`` (and its parents) and check that a file can be written in it.

    Commands call this before their work, so that an unwritable place is told at the start and not after an hour.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = Path(path)
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"cannot write to folder {folder}: {_reason(error)}; give another one") from error
    return folder


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented, strict JSON, atomically. NaN and infinities become null, which every reader understands."""
    with atomic_write(path) as file:
        json.dump(strict(value), file, indent=2, allow_nan=False)
        file.write("\n")


def write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV, atomically. The columns are the keys in order of first appearance; a missing value is left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append(path: str | os.PathLike[str], text: str) -> None:
    """Append ``text`` (UTF-8) to ``path`` and hand it to the system at once, so that a killed process leaves it.

    Raises:
        OutputError: the disk is full, or ``path`` is a named pipe, which would be waited for without end.
    """
    _refuse_pipe(Path(path))
    with disk_errors(Path(path)), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def strict(value: Any) -> Any:
    """``value`` made of what JSON has: tensors and arrays as lists, paths as strings, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [strict(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # torch, numpy
        return strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What the disk or the file system does to a writer of ``target`` within the block, as an ``OutputError``."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        # h5py and others put the number into the text and leave errno empty.
        in_text = re.search(r"errno = (\d+)|os error (\d+)", str(error))
        number = error.errno if error.errno is not None else int(next(filter(None, in_text.groups()))) if in_text else None
        if number not in _DISK:
            raise
        raise OutputError(f"cannot write {target}: {os.strerror(number)}; free some space or give another place") from error


def _refuse_pipe(path: Path) -> None:
    """Opening a pipe waits until somebody reads it."""
    if path.is_fifo():
        raise OutputError(f"cannot write {path}: it is a named pipe; remove it, or give another place")


def _is_device(path: Path) -> bool:
    _refuse_pipe(path)
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut. Some network file systems refuse to sync a folder; the file is whole there too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    if isinstance(error, FileExistsError):
        return "there is a file of that name"
    return os.strerror(error.errno) if error.errno else str(error)
