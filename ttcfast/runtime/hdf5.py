"""Opens HDF5 files safely: regular files that hold all their values themselves, few at a time."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import h5py
import numpy as np

from .errors import DataError
from .files import error_number, require_regular

# Deflate expands one byte to at most 1032; other filters of numeric data sets expand less.
_EXPANSION = 1032
# Enough for a training run on a thousand files, and a share of the limit that leaves descriptors to the process.
_MOST, _SHARE = 256, 4


class _Closable(Protocol):
    def close(self) -> None: ...


H = TypeVar("H", bound=_Closable)


def open_hdf5(path: Path, what: str, missing: str) -> h5py.File:
    """Open ``path`` for reading after checking that nothing in it refers to other files.

    Args:
        path: The file.
        what: Kind of file for messages: ``"data file"``.
        missing: Remedy if it does not exist.

    Raises:
        DataError: missing, no regular file, truncated or no HDF5 (NetCDF4) file; external links, virtual data sets and external storage,
            whose values lie in other files, of which HDF5 makes zeros where they are missing; too many open files.
    """
    place = require_regular(path, what, missing)
    try:
        file = h5py.File(place, "r")
    except OSError as error:
        if error_number(error) in (errno.EMFILE, errno.ENFILE):
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise DataError(f"{what} {path} cannot be opened: this process has too many open files (limit {limit}); ulimit -n") from error
        raise DataError(f"{what} {path} is empty, truncated or no HDF5 file ({error}); make or copy it again") from error
    try:
        found = _outside(file)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        file.close()
        raise DataError(f"{what} {path} is damaged ({error}); make or copy it again") from error
    if found is not None:
        file.close()
        raise DataError(f"{what} {path} points out of itself: {found}; copy the values into the file")
    return file


def array(data: h5py.Dataset) -> np.ndarray:
    """Return all values of a data set of a header.

    Raises:
        ValueError: The file declares more values than it holds, which would fill the memory with zeros.
    """
    held = data.id.get_storage_size()
    filtered = data.id.get_create_plist().get_nfilters() > 0
    _require_held(data, data.nbytes, held * (_EXPANSION if filtered else 1), held)
    return np.asarray(data)


def require_held(data: h5py.Dataset) -> None:
    """Raise ``ValueError`` if one entry along the first axis of ``data`` (a trajectory) is larger than the whole file can hold."""
    size = data.file.id.get_filesize()
    _require_held(data, math.prod(data.shape[1:]) * data.dtype.itemsize, size * _EXPANSION, size)


def _require_held(data: h5py.Dataset, declared: int, most: int, held: int) -> None:
    if declared > most:
        raise ValueError(f"{data.name.lstrip('/')} is declared as {list(data.shape)} of {data.dtype}, and {held} bytes of it are there")


def _outside(file: h5py.File) -> str | None:
    """Return a description of the first reference to another file, without following it."""
    links: list[tuple[bytes, int]] = []
    file.id.links.visit(lambda name, info: links.append((name, info.type)), info=True)
    for name, kind in links:
        told = name.decode(errors="replace")
        if kind not in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT):  # a soft link stays within the file unless it leads to an external one
            return f"{told} is an external link"
        if kind == h5py.h5l.TYPE_SOFT:
            continue
        item = h5py.h5o.open(file.id, name)
        if isinstance(item, h5py.h5d.DatasetID):
            made = item.get_create_plist()
            if made.get_layout() == h5py.h5d.VIRTUAL:
                return f"{told} is a virtual data set"
            if made.get_external_count():
                return f"{told} has external storage"
    return None


class _Handle:
    """An open file and its number of current readers."""

    def __init__(self, opened: _Closable) -> None:
        self.opened, self.users = opened, 0


class _Handles:
    """The open files of this process by owner, the most recently used last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.of: weakref.WeakKeyDictionary[object, _Handle] = weakref.WeakKeyDictionary()
        self.process = os.getpid()

    def make_room(self, most: int) -> None:
        idle = [(owner, handle) for owner, handle in self.of.items() if not handle.users]
        for owner, handle in idle[: max(0, len(self.of) - most)]:
            del self.of[owner]
            handle.opened.close()


_HANDLES = _Handles()
# A child forked while another thread holds the lock would wait for it forever.
os.register_at_fork(before=_HANDLES.lock.acquire, after_in_parent=_HANDLES.lock.release, after_in_child=_HANDLES.lock.release)


@contextlib.contextmanager
def held_open(owner: object, opener: Callable[[], H]) -> Iterator[H]:
    """Yield the file that ``opener`` opens, kept open for the next use by ``owner`` until other files need its place.

    At most a quarter of the process's file descriptors, and at most 256, are open at a time. A file in use by another thread is not closed.
    A forked process opens its own. Files are closed with their owner.
    """
    with _HANDLES.lock:
        if _HANDLES.process != os.getpid():
            _HANDLES.of, _HANDLES.process = weakref.WeakKeyDictionary(), os.getpid()
        handle = _HANDLES.of.pop(owner, None)
        if handle is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            most = _MOST if limit == resource.RLIM_INFINITY else max(1, min(_MOST, limit // _SHARE))
            _HANDLES.make_room(most - 1)
            handle = _Handle(opener())
        _HANDLES.of[owner] = handle  # at the end
        handle.users += 1
    try:
        yield handle.opened  # type: ignore[misc]  # what this owner's opener gave
    finally:
        with _HANDLES.lock:
            handle.users -= 1
            if not handle.users and _HANDLES.of.get(owner) is not handle:
                handle.opened.close()


def close(owner: object) -> None:
    """Close the file of ``owner`` once it has no readers; its next use opens it again."""
    with _HANDLES.lock:
        if _HANDLES.process == os.getpid() and (handle := _HANDLES.of.pop(owner, None)) is not None and not handle.users:
            handle.opened.close()
