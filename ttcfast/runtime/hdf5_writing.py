"""Writes HDF5 files atomically, also on a full disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import h5py

from .files import atomic_path
from .steady import steady


@contextlib.contextmanager
def new_hdf5(path: str | os.PathLike[str], **options: Any) -> Iterator[h5py.File]:
    """Yield a new HDF5 file, which appears at ``path`` when the block ends without an error.

    Args:
        path: The file; its folder is created if missing.
        options: Options of ``h5py.File``. ``libver=("v110", "v110")`` makes HDF5 checksum everything but the data themselves.

    Raises:
        OutputError: The folder cannot be written, the disk is full, or ``path`` is a folder.
    """
    with atomic_path(path) as place, edit_hdf5(place, "w", **options) as file:
        yield file


@contextlib.contextmanager
def edit_hdf5(path: str | os.PathLike[str], mode: str, **options: Any) -> Iterator[h5py.File]:
    """Open the existing file ``path`` for writing by HDF5 (``"w"`` truncates, ``"r+"`` keeps), shielded from disk errors.

    HDF5 writes late, at the latest on close, and crashes the process if that fails, then or at exit. It therefore writes through
    ``steady``, which keeps the first error until HDF5 is done.

    Raises:
        OSError: The first error of the disk.
    """
    with open(path, "r+b", buffering=0) as raw, steady(raw) as file, h5py.File(file, mode, **options) as held:
        yield held
