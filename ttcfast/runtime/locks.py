"""One run at a time in an output folder: a lock that the system takes back from a run that dies, and that says who holds it."""

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


_held: dict[Path, _Held] = {}  # by this process
_guard = threading.RLock()  # a forgotten log may be collected, and give its lock back, at any time


@contextlib.contextmanager
def run_lock(place: str | os.PathLike[str], *, file: bool = False) -> Iterator[None]:
    """Keep every other run out of an output folder (made when missing) or file for the length of a block.

    The lock is one of the system's on a hidden file, which holds the command, process, host and start of the run. It is removed at the end;
    one that a killed run left is free at once. A thread that holds a place may take it again, for functions that call one another. Of the
    processes that torchrun has started the first one holds it for all.

    Where the file system has no locks, a warning says so, and nothing keeps a second run out.

    Args:
        place: the folder, or the file that is written.
        file: whether it is a file.

    Raises:
        OutputError: another run holds it (named in the message), or the place cannot be written.
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
    """The descriptor that holds the lock; None where the file system has none."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not try_lock(descriptor):
                raise OutputError(
                    f"cannot write to {what}: another run is writing there{_holder(descriptor)}; wait until it ends, or give another out="
                )
            if is_at(descriptor, path):  # and was not removed by a run that has just ended
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
            return  # no locks there, or a child of the run
        own.times -= 1
        if own.times == 0:
            del _held[path]
            if is_at(own.descriptor, path):
                path.unlink()  # while it is held: who has opened it meanwhile sees that it is gone, and makes a new one
            os.close(own.descriptor)


def _sign(descriptor: int) -> None:
    entry = {
        "command": textwrap.shorten(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), 120, placeholder=" ..."),
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(entry).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        entry = parse_json(os.pread(descriptor, 4096, 0))
        return f" ({entry['command']}; process {entry['process']} on {entry['host']} since {entry['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # it has not signed yet


def _forget_in_child() -> None:
    """A child that outlives the run must not hold its lock: locks belong to open files, which a fork shares."""
    global _guard
    _guard = threading.RLock()
    for own in _held.values():
        os.close(own.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
