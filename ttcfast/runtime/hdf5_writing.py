"""HDF5 files that are whole or not there, on a full disk too."""

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
    """Give a new HDF5 file to fill, which appears at ``path`` when the block ends well.

    Args:
        path: the file; its folder is made when missing.
        options: of ``h5py.File``. ``libver=("v110", "v110")`` makes HDF5 put checksums on all that it writes beside the data themselves.

    Raises:
        OutputError: the folder cannot be written, the disk is full, ``path`` is a folder.
    """
    with atomic_path(path) as place, edit_hdf5(place, "w", **options) as file:
        yield file


@contextlib.contextmanager
def edit_hdf5(path: str | os.PathLike[str], mode: str, **options: Any) -> Iterator[h5py.File]:
    """Open the existing file ``path`` for writing by HDF5 (``"w"``: anew, ``"r+"``: as it is), which never meets an error of the disk.

    HDF5 writes late, at the latest when the file is closed, and a process in which that fails ends by a crash, then or at its exit. So it
    writes through a file of ours, which keeps the first error until HDF5 is done.

    Raises:
        OSError: what the disk said.
    """
    with open(path, "r+b", buffering=0) as raw, steady(raw) as file, h5py.File(file, mode, **options) as held:
        yield held
