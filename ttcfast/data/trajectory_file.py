"""Lazy reading of trajectory files in The Well's layout (Euler sets: density, energy, momentum)."""

from __future__ import annotations

import json
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

FIELDS = (("t0_fields", "density"), ("t1_fields", "momentum"), ("t0_fields", "energy"))


class TrajectoryFile:
    """One HDF5 file of trajectories, read piece by piece; nothing but its header is held.

    ``file[i]`` is trajectory ``i`` as ``[T+1, C, *S]`` float32 (density, momentum components, energy), physical units.
    ``read(i, start, stop)`` reads frames ``start:stop`` of it alone. The file is opened at the first read of each process, so an
    instance may be handed to data-loader workers.

    Args:
        path: the ``.hdf5`` file.

    Attributes:
        spec: the state's layout on this grid (``cell_volume`` set; ``periodic`` after the file's boundary conditions).
        times: ``[T+1]`` float64.
        shape: space dimensions. parameters: how our generator made it (empty for other files).

    Raises:
        DataError: the file is missing, damaged, truncated, or of another layout; the message says what was found.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._process = -1
        file = self._open()
        try:
            self._read_header(file)
        except (KeyError, OSError, ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise DataError(f"data file {path} is damaged or not in The Well's layout: {error}") from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"trajectory {i} of {len(self)} in {self.path}")
        return self.read(i % len(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": -1}

    def read(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Frames ``start:stop`` of trajectory ``i``: ``[stop - start, C, *S]`` float32."""
        stop = len(self.times) if stop is None else stop
        file = self._open()
        out = torch.empty((stop - start, self._channels, *self.shape), dtype=torch.float32)
        try:
            for channel, (group, name) in zip((0, 1, self._channels - 1), FIELDS, strict=True):
                values = torch.from_numpy(file[group][name][i, start:stop].astype(np.float32, copy=False))
                if name == "momentum":
                    out[:, 1 : self._channels - 1] = values.movedim(-1, 1)
                else:
                    out[:, channel] = values
        except (OSError, RuntimeError) as error:
            raise DataError(f"data file {self.path} is damaged: trajectory {i} cannot be read ({error}); make it again") from error
        return out

    def close(self) -> None:
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def _open(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():
            if not self.path.is_file():
                raise DataError(f"data file {self.path} does not exist; make it with `ttcfast generate` or give another path")
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise DataError(f"data file {self.path} is truncated or no HDF5 file ({error}); make or copy it again") from error
            self._process = os.getpid()
        return self._file

    def _read_header(self, file: h5py.File) -> None:
        missing = [f"{group}/{name}" for group, name in FIELDS if group not in file or name not in file[group]]
        if missing or "dimensions" not in file:
            found = sorted(f"{g}/{n}" for g in file if isinstance(file[g], h5py.Group) for n in file[g])
            raise ValueError(f"{', '.join(missing) or 'dimensions'} not there; found {', '.join(found) or 'nothing'}")
        density, energy, momentum = (file["t0_fields"]["density"], file["t0_fields"]["energy"], file["t1_fields"]["momentum"])
        times = np.asarray(file["dimensions"]["time"], dtype=np.float64)
        self._count, self.shape = density.shape[0], tuple(density.shape[2:])
        ndim = len(self.shape)
        expected = (self._count, len(times), *self.shape)
        for name, found in (("density", density.shape), ("energy", energy.shape), ("momentum", momentum.shape[:-1])):
            if found != expected:
                raise ValueError(f"{name} has shape {found}; with {len(times)} times it should be {expected}")
        self.times = torch.from_numpy(times)
        self._channels = momentum.shape[-1] + 2
        self.parameters = json.loads(_text(file.attrs.get("simulation_parameters", "{}"))) if _is_json(file) else {}
        self.spec = StateSpec(
            momentum=tuple(range(1, self._channels - 1)),
            energy=self._channels - 1,
            gamma=_gamma(file),
            cell_volume=_cell_volume(file, self.shape),
            ndim=ndim,
            periodic=_axes_with(file, ndim, "PERIODIC"),
            closed=_closed(file, ndim),
        )


def read_trajectories(paths: Sequence[str | os.PathLike[str]], count: int | None = None) -> tuple[Tensor, TrajectoryFile]:
    """``count`` trajectories ``[N, T+1, C, *S]``, and the first file (for its spec and times).

    They are taken from the files in turn, the first of each, then the second of each: a few stand for all.

    Raises:
        DataError: no path, a file that cannot be read, fewer than ``count`` trajectories, files on different grids.
    """
    if not paths:
        raise DataError("no data file given; name at least one .hdf5 file or a folder that holds some")
    files = [TrajectoryFile(p) for p in paths]
    require_alike(files)
    available = sum(len(f) for f in files)
    wanted = available if count is None else count
    if wanted > available or wanted < 1:
        raise DataError(
            f"{wanted} trajectories asked for, the {len(files)} data files hold {available}; give a number from 1 to {available}"
        )
    picked = sorted(((f, i) for f in files for i in range(len(f))), key=lambda pick: pick[1])[:wanted]
    return torch.stack([f[i] for f, i in picked]), files[0]


def require_alike(files: Sequence[TrajectoryFile]) -> None:
    """Raise ``DataError`` unless all files have one grid, one set of times and one physics; the message names the first difference."""
    first = _kind(files[0])
    for other in files[1:]:
        for name, value in _kind(other).items():
            if value != first[name]:
                raise DataError(f"data file {other.path} has {name} {value}; {files[0].path} has {first[name]}: read them in two runs")


def _kind(file: TrajectoryFile) -> dict[str, object]:
    spec, step = file.spec, file.times.diff()
    return {
        "grid": file.shape,
        "frames": len(file.times),
        "time step": round(float(step.mean()), 6) if len(step) else 0.0,
        "gamma": spec.gamma,
        "cell volume": spec.cell_volume,
        "periodic axes": spec.periodic_axes,
        "closed": spec.closed,
    }


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


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _is_json(file: h5py.File) -> bool:
    return _text(file.attrs.get("simulation_parameters", "")).lstrip().startswith("{")


def _gamma(file: h5py.File) -> float:
    if "scalars" in file and "gamma" in file["scalars"]:
        return round(float(np.asarray(file["scalars"]["gamma"]).ravel()[0]), 6)
    return 1.4


def _cell_volume(file: h5py.File, shape: tuple[int, ...]) -> float:
    volume = 1.0
    for name, n in zip(("x", "y", "z"), shape, strict=False):
        x = np.asarray(file["dimensions"][name], dtype=np.float64) if name in file["dimensions"] else np.arange(n) / n
        volume *= float(x[-1] - x[0]) / max(n - 1, 1) if n > 1 else 1.0
    return volume


def _closed(file: h5py.File, ndim: int) -> bool:
    """Walls wherever the domain does not wrap around."""
    walls, wraps = _axes_with(file, ndim, "WALL"), _axes_with(file, ndim, "PERIODIC")
    return any(walls) and all(a or b for a, b in zip(walls, wraps, strict=True))


def _axes_with(file: h5py.File, ndim: int, kind: str) -> tuple[bool, ...]:
    flags = [False] * ndim
    for name, side in file.get("boundary_conditions", {}).items():
        if _text(side.attrs.get("bc_type", "")).upper() == kind:
            for axis in range(ndim):
                flags[axis] |= name.startswith("xyz"[axis])
    return tuple(flags)
