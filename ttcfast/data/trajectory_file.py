"""Lazy reading of trajectory files in The Well's layout, of a gas or of any other physics, and search for such files."""

from __future__ import annotations

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

from ttcfast.runtime import hdf5
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import entries, parse_json
from ttcfast.spec import EulerSpec, FieldSpec

from .alike import agree, require_alike
from .reader import TrajectoryReader, instants, space_axes, spacing, values
from .trajectory_set import TrajectorySet
from .well_fields import GROUPS, LAYOUT, StoredField, described, scalars_of, spatial_axes, stored_fields, texts
from .well_layout import CHECKSUM, header_checksum

logger = logging.getLogger(__name__)

SUFFIXES = (".hdf5", ".h5")
FIELDS = (("t0_fields", "density"), ("t1_fields", "momentum"), ("t0_fields", "energy"))


class TrajectoryFile(TrajectoryReader):
    """Reads one HDF5 file in The Well's layout; see ``TrajectoryReader``.

    ``file[i]`` is trajectory ``i`` as ``[T+1, C, *S]`` float32. Of a gas (density, momentum and energy are there) these are the channels;
    the pressure that The Well's Euler sets also store is not read, since the other fields determine it. Of any other physics every field is
    read, in the order of the groups' ``field_names``: scalars, components of vectors (``velocity_x``), components of tensors
    (``stress_xy``). Fields that do not vary in time, between trajectories or along an axis are expanded.

    Args:
        path: The ``.hdf5`` file.

    Attributes:
        spec: State layout: ``cell_volume`` follows from the coordinates, ``periodic`` and ``closed`` from the boundary conditions,
            ``gamma`` from the scalars (``[N]`` if it varies between trajectories, 1.4 if the file has none). Of other physics it is
            ``StateSpec.fields(...)``, in which fields that do not vary in time are ``given``. What a file cannot say (what is conserved,
            bounds, which channels to read) its root attribute ``ttcfast_layout`` tells, the JSON of ``StateSpec.to_meta()``; the entries
            it has override all others.
        scalars: The numbers of whole trajectories, such as viscosities, by name: float64 ``[]``, or ``[N]`` where they differ.
        parameters: Settings of ``ttcfast generate``; empty for other files.

    Raises:
        DataError: The file is missing, damaged, truncated or of another layout; the message says what was found.

    Source: the description of the data format in The Well's repository (PolymathicAI).
    """

    layout = "The Well's"
    remedy = "make it again"
    _fields: Sequence[StoredField] = ()  # of other physics than a gas
    _channels: tuple[str, ...]

    def _read(self, file: h5py.File, i: int, start: int, stop: int, out: Tensor) -> None:
        for field in self._fields:
            held = [(k, self._channels.index(name)) for k, name in enumerate(field.names) if name in self._channels]
            if held:
                taken, channels = map(list, zip(*held, strict=True))
                out[:, channels] = field.read(file, i, start, stop, self.shape)[:, taken]
        if self._fields:
            return
        last = out.shape[1] - 1
        for channel, (group, name) in zip((0, 1, last), FIELDS, strict=True):
            read = torch.from_numpy(file[group][name][i, start:stop].astype(np.float32, copy=False))
            if name == "momentum":
                out[:, 1:last] = read.movedim(-1, 1)
            else:
                out[:, channel] = read

    def _read_header(self, file: h5py.File) -> None:
        missing = [] if isinstance(file.get("dimensions"), h5py.Group) else ["dimensions"]
        if not any(isinstance(file.get(group), h5py.Group) for group in GROUPS):
            missing = [f"{group}/{name}" for group, name in FIELDS] + ["or other fields", *missing]
        if missing:
            there = sorted(f"{g}/{n}" for g in file if isinstance(file[g], h5py.Group) for n in file[g])
            there += sorted(name for name in file if isinstance(file[name], h5py.Dataset))
            raise ValueError(f"{', '.join(missing)} not there; found {', '.join(there) or 'nothing'}")
        self.parameters = _parameters(file)
        is_gas = LAYOUT not in file.attrs and all(group in file and name in file[group] for group, name in FIELDS)
        (self._read_gas if is_gas else self._read_fields)(file)
        self.scalars = scalars_of(file, self._count)
        _verify(file, self.path)

    def _read_fields(self, file: h5py.File) -> None:
        axes = spatial_axes(file)
        self.shape = tuple(values(file, f"dimensions/{name}", ["cells"]).shape[0] for name in axes)
        frames = values(file, "dimensions/time", ["time"]).shape[0]
        self.times = instants(file, "dimensions/time", frames)
        self._fields, self._count = stored_fields(file, axes, frames, self.shape)
        periodic = tuple(kinds == {"PERIODIC"} for kinds in _sides(file, axes))
        self.spec = described(file, self._fields, axes, self.shape, periodic)
        every = tuple(name for field in self._fields for name in field.names)
        self._channels = self.spec.names if isinstance(self.spec, FieldSpec) else every[: self.spec.num_channels]
        own = self.spec.distances if isinstance(self.spec, FieldSpec) else None
        self.spacing = own or (float(torch.as_tensor(self.spec.cell_volume).mean()) ** (1 / len(axes)),) * len(axes)

    def _read_gas(self, file: h5py.File) -> None:
        self._count, _, *cells = values(file, "t0_fields/density", ["sample", "time", *space_axes(file, "t0_fields/density")]).shape
        self.shape = tuple(cells)
        ndim, frames = len(self.shape), values(file, "dimensions/time", ["time"]).shape[0]
        for group, name in FIELDS:
            values(file, f"{group}/{name}", [self._count, frames, *self.shape, *(["component"] if name == "momentum" else [])])
        self.times = instants(file, "dimensions/time", frames)
        channels = file["t1_fields/momentum"].shape[-1] + 2
        self.spacing = tuple(spacing(file, f"dimensions/{name}", n) for name, n in zip("xyz", self.shape, strict=False))
        sides = _sides(file, "xyz"[:ndim])
        self.spec = EulerSpec(
            momentum=tuple(range(1, channels - 1)),
            energy=channels - 1,
            gamma=_gamma(file, self._count),
            cell_volume=math.prod(self.spacing),
            ndim=ndim,
            periodic=tuple(kinds == {"PERIODIC"} for kinds in sides),
            closed=all(kinds and kinds <= {"WALL", "PERIODIC"} for kinds in sides) and any("WALL" in kinds for kinds in sides),
        )


def read_trajectories(paths: Sequence[str | os.PathLike[str]], count: int | None = None) -> tuple[Tensor, TrajectoryReader]:
    """Read ``count`` trajectories ``[N, T+1, C, *S]`` of files in The Well's layout; also return the first file, for its spec and times.

    Trajectories are taken in round-robin order: the first of each file, then the second of each. ``open_trajectories`` reads other
    formats lazily, and files of different gamma.

    Raises:
        DataError: No path, an unreadable file, fewer than ``count`` trajectories, or files on different grids or of different gamma.
    """
    found = TrajectorySet([TrajectoryFile(p) for p in paths])
    require_alike(found.files)
    return found.first(count).stack(), found.files[0]


def find_files(root: str | os.PathLike[str], split: str | None = None) -> list[Path]:
    """Return the ``.hdf5`` files of a split: ``root`` itself if it is a file, else ``root[/data][/split]/*.hdf5``, sorted.

    Raises:
        DataError: There are none.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        return [root]
    folders = [root / "data" / split, root / split] if split else [root, root / "data"]
    for folder in folders:
        if files := entries(folder, *SUFFIXES):
            return files
    raise DataError(f"no .hdf5 file in {' or '.join(map(str, folders))}; make some with `ttcfast generate out={root}`")


def _verify(file: h5py.File, path: Path) -> None:
    """Verify the header checksum of files written by ttcfast; HDF5's own checksums cover the fields."""
    if CHECKSUM in file.attrs:
        if int(file.attrs[CHECKSUM]) != int(header_checksum(file)):
            raise ValueError(
                f"an attribute, axis or scalar has changed since it was written ({CHECKSUM} does not fit); copy it again, or remove that "
                "attribute if the change was meant"
            )
    elif _parameters(file):
        logger.info("%s was written by an older ttcfast without checksums: bits that flip in it go unnoticed", path)


def _text(value: Any) -> str:
    found = texts(value)  # some writers store a text as an array of one
    return found[0] if len(found) == 1 else str(value)


def _parameters(file: h5py.File) -> dict[str, Any]:
    """Return the settings stored by ``ttcfast generate``; other files list names of scalars in that attribute."""
    said = _text(file.attrs.get("simulation_parameters", "")).lstrip()
    return parse_json(said) if said.startswith("{") else {}


def _gamma(file: h5py.File, count: int) -> float | Tensor:
    """Return one number, or float64 ``[N]`` if the trajectories differ."""
    if "scalars" not in file or "gamma" not in file["scalars"]:
        return 1.4
    stored = file["scalars"]["gamma"]
    if stored.dtype.kind not in "fiu":
        raise ValueError(f"scalars/gamma is of {stored.dtype}; expected real numbers")
    # The file stores single precision: 1.4 is meant, not 1.39999998.
    found = np.round(np.squeeze(hdf5.array(stored)).astype(np.float64), 6)
    if found.size == 0 or (found.size > 1 and found.shape != (count,)):
        raise ValueError(f"scalars/gamma has shape {stored.shape}; expected one number, or one per trajectory ({count},)")
    return float(found.flat[0]) if agree(found, found.flat[0]) else torch.from_numpy(found)


def _sides(file: h5py.File, axes: Sequence[str]) -> list[set[str]]:
    """Return the boundary kinds of each axis: WALL, OPEN, PERIODIC or others; an end that no entry covers adds OPEN."""
    kinds: list[set[str]] = [set() for _ in axes]
    ends: list[list[np.ndarray]] = [[] for _ in axes]  # per axis, which of the first and last cells each part covers
    for name, side in file.get("boundary_conditions", {}).items():
        on = [_text(dim) for dim in np.atleast_1d(side.attrs.get("associated_dims", []))] or [name[:1].lower()]
        kind, mask = _text(side.attrs.get("bc_type", "")).upper(), hdf5.array(side["mask"]).astype(bool) if "mask" in side else None
        # A periodic boundary covers both ends; of a mask over several axes, which marks parts of sides, only the kind counts.
        covered = np.array([True, True]) if kind == "PERIODIC" or mask is None or mask.ndim != 1 else mask[[0, -1]]
        for axis, dim in enumerate(axes):
            if dim in on:
                kinds[axis].add(kind)
                ends[axis].append(covered)
    for axis in range(len(axes)):
        if ends[axis] and not np.any(ends[axis], axis=0).all():
            kinds[axis].add("OPEN")
    return kinds
