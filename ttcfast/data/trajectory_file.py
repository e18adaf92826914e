"""Lazy reading of trajectory files in The Well's layout (Euler sets: density, energy, momentum), and finding them."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec

from .reader import TrajectoryReader, instants, spacing, values
from .trajectory_set import TrajectorySet, require_alike
from .well_layout import CHECKSUM, header_checksum

logger = logging.getLogger(__name__)

FIELDS = (("t0_fields", "density"), ("t1_fields", "momentum"), ("t0_fields", "energy"))


class TrajectoryFile(TrajectoryReader):
    """One HDF5 file in The Well's layout; see ``TrajectoryReader``.

    ``file[i]`` is trajectory ``i`` as ``[T+1, C, *S]`` float32: density, momentum components, energy. The pressure that The Well's Euler
    sets hold beside them is not read, since these determine it.

    Args:
        path: the ``.hdf5`` file.

    Attributes:
        spec: ``cell_volume`` from the coordinates, ``periodic`` and ``closed`` from the boundary conditions, ``gamma`` from the scalars
            (``[N]`` where it varies between trajectories; 1.4 where the file has none).
        parameters: how our generator made it (empty for other files).

    Raises:
        DataError: the file is missing, damaged, truncated, or of another layout; the message says what was found.

    Source: docs/data_format.md of The Well (PolymathicAI).
    """

    layout = "The Well's"
    remedy = "make it again"

    def _read(self, file: h5py.File, i: int, start: int, stop: int, out: Tensor) -> None:
        last = out.shape[1] - 1
        for channel, (group, name) in zip((0, 1, last), FIELDS, strict=True):
            read = torch.from_numpy(file[group][name][i, start:stop].astype(np.float32, copy=False))
            if name == "momentum":
                out[:, 1:last] = read.movedim(-1, 1)
            else:
                out[:, channel] = read

    def _read_header(self, file: h5py.File) -> None:
        missing = [f"{group}/{name}" for group, name in FIELDS if group not in file or name not in file[group]]
        if missing or "dimensions" not in file:
            found = sorted(f"{g}/{n}" for g in file if isinstance(file[g], h5py.Group) for n in file[g])
            found += sorted(name for name in file if isinstance(file[name], h5py.Dataset))
            raise ValueError(f"{', '.join(missing) or 'dimensions'} not there; found {', '.join(found) or 'nothing'}")
        density, energy, momentum = (file["t0_fields"]["density"], file["t0_fields"]["energy"], file["t1_fields"]["momentum"])
        self._count, self.shape = density.shape[0], tuple(density.shape[2:])
        ndim, frames = len(self.shape), values(file, "dimensions/time", ["time"]).shape[0]
        expected = (self._count, frames, *self.shape)
        for name, found in (("density", density.shape), ("energy", energy.shape), ("momentum", momentum.shape[:-1])):
            if found != expected:
                raise ValueError(f"{name} has shape {found}; with {frames} times it should be {expected}")
        self.times = instants(file, "dimensions/time", frames)
        channels = momentum.shape[-1] + 2
        self.parameters = json.loads(_text(file.attrs.get("simulation_parameters", "{}"))) if _is_json(file) else {}
        self.spec = StateSpec(
            momentum=tuple(range(1, channels - 1)),
            energy=channels - 1,
            gamma=_gamma(file, self._count),
            cell_volume=math.prod(spacing(file, f"dimensions/{name}", n) for name, n in zip("xyz", self.shape, strict=False)),
            ndim=ndim,
            periodic=_axes_with(file, ndim, "PERIODIC"),
            closed=_closed(file, ndim),
        )
        _verify(file, self.path)


def read_trajectories(paths: Sequence[str | os.PathLike[str]], count: int | None = None) -> tuple[Tensor, TrajectoryFile]:
    """``count`` trajectories ``[N, T+1, C, *S]`` of files in The Well's layout, and the first file (for its spec and times).

    They are taken from the files in turn, the first of each, then the second of each: a few stand for all. ``open_trajectories`` reads
    other formats too, lazily, and files of different gamma.

    Raises:
        DataError: no path, a file that cannot be read, fewer than ``count`` trajectories, files on different grids or of different gamma.
    """
    if not paths:
        raise DataError("no data file given; name at least one .hdf5 file or a folder that holds some")
    files = [TrajectoryFile(p) for p in paths]
    require_alike(files)
    return TrajectorySet(files).first(count).stack(), files[0]


def find_files(root: str | os.PathLike[str], split: str | None = None) -> list[Path]:
    """The ``.hdf5`` files of a split: ``root`` itself when it is a file, else ``root[/data][/split]/*.hdf5``, sorted.

    Raises:
        DataError: there are none.
    """
    root = Path(root)
    if root.is_file():
        return [root]
    folders = [root / "data" / split, root / split] if split else [root, root / "data"]
    for folder in folders:
        # A killed writer leaves a hidden partial file.
        if files := sorted(p for p in [*folder.glob("*.hdf5"), *folder.glob("*.h5")] if not p.name.startswith(".")):
            return files
    raise DataError(f"no .hdf5 file in {' or '.join(map(str, folders))}; make some with `ttcfast generate out={root}`")


def _verify(file: h5py.File, path: Path) -> None:
    """Compare the checksum of a header of ours; data that are read later have HDF5's own."""
    if CHECKSUM in file.attrs:
        if int(file.attrs[CHECKSUM]) != int(header_checksum(file)):
            raise ValueError(f"an attribute, axis or scalar has changed since it was written ({CHECKSUM} does not fit)")
    elif _is_json(file):
        logger.info("%s was written by an older ttcfast without checksums: bits that flip in it go unnoticed", path)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_json(file: h5py.File) -> bool:
    return _text(file.attrs.get("simulation_parameters", "")).lstrip().startswith("{")


def _gamma(file: h5py.File, count: int) -> float | Tensor:
    """One number for the file, or float64 ``[N]`` where its trajectories differ."""
    if "scalars" not in file or "gamma" not in file["scalars"]:
        return 1.4
    # Stored in single precision: 1.4 is meant, not 1.39999998.
    found = np.round(np.asarray(file["scalars"]["gamma"], dtype=np.float64), 6)
    if found.size == 0 or (found.size > 1 and found.shape != (count,)):
        raise ValueError(f"scalars/gamma has shape {found.shape}; expected one number, or one per trajectory ({count},)")
    same = bool((found == found.flat[0]).all())
    return float(found.flat[0]) if same else torch.from_numpy(found)


def _closed(file: h5py.File, ndim: int) -> bool:
    """Walls wherever the domain does not wrap around."""
    walls, wraps = _axes_with(file, ndim, "WALL"), _axes_with(file, ndim, "PERIODIC")
    return any(walls) and all(a or b for a, b in zip(walls, wraps, strict=True))


def _axes_with(file: h5py.File, ndim: int, kind: str) -> tuple[bool, ...]:
    flags = [False] * ndim
    for name, side in file.get("boundary_conditions", {}).items():
        if _text(side.attrs.get("bc_type", "")).upper() == kind:
            on = [_text(dim) for dim in side.attrs.get("associated_dims", [])] or [name[:1].lower()]
            for axis in range(ndim):
                flags[axis] |= "xyz"[axis] in on
    return tuple(flags)
