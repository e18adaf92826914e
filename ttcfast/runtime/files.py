"""Writes files atomically: beside their place, flushed to disk, then renamed.

A partial file has a random name and is locked by its writer. A killed writer holds no lock, so that the next process that writes into the
folder can remove its partial file, in any container and on any host that sees the same locks.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import json
import math
import os
import re
import secrets
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .errors import DataError, OutputError, UserError

# Errors of the disk or the file system. Other OSErrors within a writing block (such as a missing input) are passed on.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG}
_PARTIAL = re.compile(r"\..*\.[0-9a-f]{16}\.partial(\.[^.]*)?")
_WHOLE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock: the whole file, for writing
_swept: set[Path] = set()  # folders in which this process has removed partial files of killed writers


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_regular(path: str | os.PathLike[str], what: str, missing: str, error: type[UserError] = DataError, *, told: str = "") -> Path:
    """Return the absolute path of a regular file (or link to one), before anything opens it: opening a pipe would wait forever.

    Args:
        path: The file.
        what: Kind of file for the message: ``"data file"``.
        missing: Remedy if it does not exist.
        error: Exception to raise.
        told: Origin of the path for the message: ``" (named by list.txt)"``.

    Raises:
        DataError, or ``error``: It is missing, or a folder, named pipe, socket or device.
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
    """Return the visible files in ``folder`` whose names end in one of ``suffixes`` (``".hdf5"``), in upper or lower case, sorted.

    Partial files of killed writers are hidden. The list is empty if the folder does not exist.
    """
    place = Path(folder)
    if not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` for a writer that takes a path (h5py, matplotlib), and rename it into place at the end.

    The temporary file exists, empty, and is exclusive; its name keeps the suffix, from which some writers infer the format. If the block
    raises, it is removed and ``path`` is unchanged. The new file has the permissions of the one that it replaces, or those of the umask.
    A device such as ``/dev/full`` is passed through unchanged.

    Raises:
        OutputError: The folder cannot be written, the disk is full, or ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))  # follow a link, so that it stays a link
    with disk_errors(target):
        _refuse_pipe(target)
        if target.exists() and not (target.is_file() or target.is_dir()):
            yield target
            return
        output_folder(target.parent)
        if target.is_dir():
            raise OutputError(f"cannot write {target}: it is a folder; give the name of a file")
        partial, descriptor = _new_partial(target)
        try:
            yield partial
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(partial, stat.S_IMODE(target.stat().st_mode))
            os.replace(partial, target)
            _sync_folder(target.parent)
        finally:
            partial.unlink(missing_ok=True)
            os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open ``path`` for writing so that it appears whole or not at all.

    Args:
        path: The file; its folder is created if missing.
        mode: ``"w"`` (UTF-8 text, ``\\n`` line ends) or ``"wb"``.

    Raises:
        OutputError: The folder cannot be written, the disk is full, or ``path`` is a folder.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode is {mode!r}; it must be 'w' or 'wb'")
    text: dict[str, str] = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    with atomic_path(path) as place, open(place, mode, **text) as file:  # type: ignore[call-overload]
        yield file
        file.flush()


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder ``path`` (and its parents) and check that a file can be written in it.

    Commands call this first, so that an unwritable folder raises at the start and not after an hour. The first call of a process for a
    folder removes the temporary files of killed writers from it.

    Raises:
        OutputError: It cannot be created or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # unnamed where the system supports it
        place = folder.resolve()
    except OSError as error:
        raise OutputError(f"cannot write to folder {folder}: {_reason(error)}; give another one") from error
    if place not in _swept:
        _swept.add(place)
        _remove_leavings(place)
    return folder


def reserve(path: str | os.PathLike[str]) -> None:
    """Reserve disk space for the holes of a file, so that a full disk raises now and not when they are filled."""
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
        except OSError as error:
            if error.errno in _DISK:
                raise  # else the file system does not support it, and a later write raises


def try_lock(descriptor: int) -> bool:
    """Lock an open file until ``descriptor`` is closed, at the latest when the process ends or is killed.

    The locks are those of open file descriptions where the system has them: unlike ``flock``'s they do not conflict with HDF5's locks, and
    unlike ``lockf``'s they hold between threads and survive the closing of another descriptor.

    Returns:
        False if it is locked already.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # on a system without the other kind
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` still names the open file, rather than nothing or a newer one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def parse_json(text: str | bytes) -> Any:
    """Parse a file's JSON.

    Raises:
        ValueError: It is not JSON, or nested too deeply for Python's parser.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


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
    """Append ``text`` (UTF-8) to ``path`` unbuffered, so that it survives if the process is killed.

    Raises:
        OutputError: The disk is full, or ``path`` is a named pipe, whose opening would wait forever.
    """
    _refuse_pipe(Path(path))
    with disk_errors(Path(path)), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def strict(value: Any) -> Any:
    """Convert ``value`` to JSON types: tensors and arrays to lists, paths to strings, non-finite numbers to None."""
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


def error_number(error: OSError) -> int | None:
    """Return the errno of an error, which h5py and others put into its text instead."""
    in_text = re.search(r"(?:errno =|os error) (\d+)", str(error))
    return error.errno if error.errno is not None else int(in_text[1]) if in_text else None


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Convert errors of the disk or file system within the block, which writes ``target``, to ``OutputError``."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        number = error_number(error)
        if number is None or number not in _DISK:
            raise
        raise OutputError(f"cannot write {target}: {os.strerror(number)}; free some space or give another place") from error


def _refuse_pipe(path: Path) -> None:
    """Raise for a pipe, whose opening would wait for a reader."""
    if path.is_fifo():
        raise OutputError(f"cannot write {path}: it is a named pipe; remove it, or give another place")


def _new_partial(target: Path) -> tuple[Path, int]:
    """Create a file beside ``target``, and return it with the descriptor that locks it."""
    stem = target.stem.encode()[:100].decode(errors="ignore")  # a name holds 255 bytes
    suffix = target.suffix if len(target.suffix) <= 16 else ""  # a longer one names no format
    while True:
        place = target.with_name(f".{stem}.{secrets.token_hex(8)}.partial{suffix}")
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        try:
            locked = try_lock(descriptor)
        except OSError:
            return place, descriptor  # without locks no process can mistake it for a dead writer's
        if locked and is_at(descriptor, place):
            return place, descriptor
        os.close(descriptor)  # another process removed it before it was locked


def _remove_leavings(folder: Path) -> None:
    """Remove the temporary files of dead writers."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError):  # renamed meanwhile, or another user's
                    _remove_if_dead(entry.path)


def _remove_if_dead(partial: str) -> None:
    descriptor = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if try_lock(descriptor):
            os.unlink(partial)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut. Some network file systems cannot sync a folder; the file is complete there, too."""
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
