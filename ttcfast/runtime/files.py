"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed.

What is being written has a random name and is locked by its writer. A writer that was killed holds no lock, so the next process that writes
into the folder tells such leavings from the files of the living, in any container and on any host that sees the same locks.
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

# What the disk or the file system does to a writer. Other OSErrors inside a writing block (a missing input, say) are not ours to rename.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG}
_PARTIAL = re.compile(r"\..*\.[0-9a-f]{16}\.partial(\.[^.]*)?")
_WHOLE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock: the whole file, for writing
_swept: set[Path] = set()  # folders that this process has looked through for what killed writers left


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

    The temporary file is there already, empty, and nobody else's; its name keeps the suffix, since some writers read the format from it.
    If the block raises, it is removed and whatever was at ``path`` before is still there. The new file has the permissions of the one that
    it replaces, or those that the umask leaves. A device such as ``/dev/full`` is handed through as it is.

    Raises:
        OutputError: the folder cannot be written, the disk is full, ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))  # through a link, so that the link stays a link
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

    Commands call this before their work, so that an unwritable place is told at the start and not after an hour. The first call of a
    process for a folder removes the temporary files that killed writers left in it.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # without a name where the system can do that
        place = folder.resolve()
    except OSError as error:
        raise OutputError(f"cannot write to folder {folder}: {_reason(error)}; give another one") from error
    if place not in _swept:
        _swept.add(place)
        _remove_leavings(place)
    return folder


def reserve(path: str | os.PathLike[str]) -> None:
    """Have the file system set room aside for the holes of a file, so that a full disk is told now and not when they are filled."""
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))
        except OSError as error:
            if error.errno in _DISK:
                raise  # else the file system cannot do this, and a later write tells


def try_lock(descriptor: int) -> bool:
    """Lock an open file until ``descriptor`` is closed, which the end of the process does, a kill too.

    The locks are those of open file descriptions where the system has them: unlike ``flock``'s they do not meet the locks that HDF5 takes
    on its files, and unlike those of ``lockf`` they hold between threads and outlive another descriptor's closing.

    Returns:
        False where somebody else has locked it.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _WHOLE)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a system without the others
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still names the open file, and not nothing, or a newer one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def parse_json(text: str | bytes) -> Any:
    """What a file's JSON says.

    Raises:
        ValueError: it is none, or nested so deeply that Python's reader gives up.
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


def error_number(error: OSError) -> int | None:
    """Return the errno of an error, which h5py and others put into its text instead."""
    in_text = re.search(r"(?:errno =|os error) (\d+)", str(error))
    return error.errno if error.errno is not None else int(in_text[1]) if in_text else None


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """What the disk or the file system does to a writer of ``target`` within the block, as an ``OutputError``."""
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
    """Opening a pipe waits until somebody reads it."""
    if path.is_fifo():
        raise OutputError(f"cannot write {path}: it is a named pipe; remove it, or give another place")


def _new_partial(target: Path) -> tuple[Path, int]:
    """A new file beside ``target``, and the descriptor that locks it."""
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
            return place, descriptor  # no locks here, so nobody can take it for a dead writer's
        if locked and is_at(descriptor, place):
            return place, descriptor
        os.close(descriptor)  # another process looked through the folder before the lock was there


def _remove_leavings(folder: Path) -> None:
    """Remove the temporary files whose writers have died."""
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
