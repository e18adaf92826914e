"""Locks an output folder for one run; the system releases the lock of a run that dies."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .distributed import launched_rank
from .errors import OutputError
from .files import disk_errors, is_at, output_folder, parse_json, try_lock

logger = logging.getLogger(__name__)

NAME = ".ttcfast.lock"  # in the folder; a file's lock lies beside it


@dataclass
class _Held:
    descriptor: int
    thread: int
    times: int = 1


_held: dict[Path, _Held] = {}  # held by this process
_guard = threading.RLock()  # garbage collection of a log may release its lock at any time


@contextlib.contextmanager
def run_lock(place: str | os.PathLike[str], *, file: bool = False) -> Iterator[None]:
    """Lock an output folder (created if missing) or file against other runs within a block.

    The lock is a system lock on a hidden file that names the command, process, host and start of the run. It is removed at the end;
    that of a killed run is released at once. A thread may lock a place again that it holds already. Of the
    processes started by torchrun, the first one holds the lock for all.

    On a file system without locks a warning is issued, and a second run is not kept out.

    Args:
        place: The output folder, or the file to be written.
        file: Whether ``place`` is a file.

    Raises:
        OutputError: Another run holds the lock (named in the message), or the place cannot be written.
    """
    if launched_rank() > 0:
        yield
        return
    given = Path(place)
    folder = output_folder(given.parent if file else given).resolve()
    path = folder / (f".{given.name}.lock" if file else NAME)
    _take(path, f"{'file' if file else 'folder'} {given}")
    try:
        yield
    finally:
        _give_back(path)


def _take(path: Path, what: str) -> None:
    with _guard:
        own = _held.get(path)
        if own is not None and own.thread == threading.get_ident():
            own.times += 1
            return
        try:
            with disk_errors(path):
                descriptor = _locked(path, what)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to {what}: {path}: {error.strerror}; remove that file, or give another out=") from error
        if descriptor is not None:
            _held[path] = _Held(descriptor, threading.get_ident())


def _locked(path: Path, what: str) -> int | None:
    """Return the descriptor that holds the lock; None where the file system has no locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not try_lock(descriptor):
                raise OutputError(
                    f"cannot write to {what}: another run is writing there{_holder(descriptor)}; wait until it ends, or give another out="
                )
            if is_at(descriptor, path):  # not removed by a run that has just ended
                _sign(descriptor)
                return descriptor
        except OutputError:
            os.close(descriptor)
            raise
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            logger.warning("%s: this file system has no locks (%s); see to it that no other run writes there", what, error.strerror)
            return None
        os.close(descriptor)


def _give_back(path: Path) -> None:
    with _guard:
        own = _held.get(path)
        if own is None:
            return  # the file system has no locks, or this is a child of the run
        own.times -= 1
        if own.times == 0:
            del _held[path]
            if is_at(own.descriptor, path):
                path.unlink()  # while it is held: another process that has opened it sees that it is gone, and creates a new one
            os.close(own.descriptor)


def _sign(descriptor: int) -> None:
    entry = {
        "command": textwrap.shorten(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), 120, placeholder=" ..."),
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds"),
    }
    with contextlib.suppress(OSError):  # on a full disk the lock holds without naming its owner
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(entry).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        entry = parse_json(os.pread(descriptor, 4096, 0))
        return f" ({entry['command']}; process {entry['process']} on {entry['host']} since {entry['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # its owner has not been written yet


def _forget_in_child() -> None:
    """Release the locks in a forked child, which shares open files and could outlive the run."""
    global _guard
    _guard = threading.RLock()
    for own in _held.values():
        os.close(own.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
