"""Lazy reading of PDEGym's compressible Euler sets (CE-*): NetCDF4 files, in numbered chunks or whole."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import entries
from ttcfast.spec import StateSpec

from .reader import TrajectoryReader, values

ChunkOrder = Literal["numeric", "lexicographic"]
Energy = Literal["stored", "pressure"]
AXES = ("sample", "time", "channel", "x", "y")
CHANNELS = 5
# Numbers of train, valid and test trajectories, which lie in this order in the whole set.
PUBLISHED = {"data": (9640, 120, 240), "solution": (1030, 100, 130)}
# Time between the 21 snapshots, which end at T = 1, in CE-RM at T = 2.
TIME_STEP = {"data": 0.05, "solution": 0.1}
# The stored energy includes the kinetic energy below the 128 x 128 grid, at most a few per cent.
_ENERGY_TOLERANCE = 0.1


class PDEGymFile(TrajectoryReader):
    """One NetCDF4 file (which is HDF5) of PDEGym's compressible Euler sets: a chunk, or a whole set; see ``TrajectoryReader``.

    The variable ``data`` ``[N, T+1, 5, X, Y]`` holds rho, u, v, p, E; in CE-RM it is called ``solution`` and its fifth channel is a tracer.
    Values are returned in physical units: unlike Poseidon's loader, the reader neither subtracts the mean pressure nor normalises.

    Args:
        path: The file.
        gamma: Ratio of specific heats, which the files do not store; None takes 1.4.
        periodic: Whether the domain is periodic. None takes ``data`` as periodic and ``solution`` as open, with a warning, since the
            boundary of CE-RM is not documented.
        energy: ``"stored"`` takes the fifth channel as the total energy density; ``"pressure"`` treats it as an extra channel, so that
            the energy is computed from the pressure. The files hold averages of a finer grid, so the two differ slightly.

    Attributes:
        spec: ``StateSpec.pdegym`` on the unit square.
        times: From 0 in steps of 0.05 (CE-RM 0.1), which the files do not store.
        variable: ``"data"`` or ``"solution"``.

    Raises:
        DataError: The file is missing, damaged, truncated or of another layout, or its fifth channel cannot be the total energy.

    Source: the data cards of huggingface.co/datasets/camlab-ethz/CE-* and Herde et al., Poseidon: Efficient Foundation Models for PDEs,
    2024 (arXiv:2405.19101).
    """

    layout = "PDEGym's"
    variable: str

    def __init__(
        self, path: str | os.PathLike[str], *, gamma: float | None = None, periodic: bool | None = None, energy: Energy = "stored"
    ) -> None:
        one_of("energy", energy, ("stored", "pressure"))
        self._gamma, self._periodic, self._energy = 1.4 if gamma is None else gamma, periodic, energy
        super().__init__(path)

    def _read_header(self, file: h5py.File) -> None:
        self.variable = "solution" if "solution" in file and "data" not in file else "data"
        data = values(file, self.variable, ["sample", "time", CHANNELS, "x", "y"])
        named = _dimension_names(data)
        if any(name in AXES and name != expected for name, expected in zip(named, AXES, strict=True)):  # unknown names are ignored
            raise ValueError(f"{self.variable} has axes {', '.join(named)}; expected {', '.join(AXES)}")
        self._count, frames = data.shape[:2]
        self.shape = tuple(data.shape[3:])
        if not self._count or not frames:
            raise ValueError(f"{self.variable} {list(data.shape)} holds no trajectory")
        self.times = torch.arange(frames, dtype=torch.float64) * TIME_STEP[self.variable]
        self.spacing = tuple(1.0 / cells for cells in self.shape)
        total = self.variable == "data" and self._energy == "stored"
        self.spec = StateSpec.pdegym(
            energy=4 if total else None,
            extra=() if total else (4,),
            gamma=self._gamma,
            cell_volume=1.0 / (self.shape[0] * self.shape[1]),
            periodic=self.variable == "data" if self._periodic is None else self._periodic,
        )
        if self.variable == "solution" and self._periodic is None:
            warnings.warn(
                "the boundary of CE-RM is not documented; it counts as open, so conservation is not imposed: give periodic= to settle it",
                stacklevel=2,
            )
        if total:
            self._check_energy(np.asarray(data[0, 0], dtype=np.float64))

    def _check_energy(self, state: np.ndarray) -> None:
        """Reject files of another scale or channel order, which would silently give wrong physics."""
        rho, u, v, pressure, energy = state
        computed = float((pressure / (self._gamma - 1) + 0.5 * rho * (u**2 + v**2)).mean())
        found = float(energy.mean())
        if not abs(found - computed) <= _ENERGY_TOLERANCE * abs(computed):
            raise ValueError(
                f"the fifth channel of data cannot be the total energy: its mean in the first frame is {found:.4g}, and rho, u, v, p with "
                f"gamma {self._gamma:g} give {computed:.4g}; give the gamma of the data, or energy=pressure to compute it"
            )

    def _read(self, file: h5py.File, i: int, start: int, stop: int, out: Tensor) -> None:
        out.copy_(torch.from_numpy(file[self.variable][i, start:stop].astype(np.float32, copy=False)))


def chunk_files(folder: Path, order: ChunkOrder = "numeric") -> list[Path]:
    """Return the ``.nc`` files of a folder in the order of the set: ``data_0.nc``, ``data_1.nc``, ..., or one whole file.

    The test split is the end of the set, so the order determines which trajectories it holds: ``"numeric"`` (0, 1, 2, ...) is that of the
    papers, ``"lexicographic"`` (0, 1, 10, 11, ..., 2, ...) that of the published script assemble_data.py.

    Raises:
        DataError: There is no file, the files are not the chunks of one set, or a chunk is missing or there twice.
    """
    files = entries(folder, ".nc")
    if not files:
        raise DataError(f"no .nc file in {folder}; give the folder of PDEGym's chunks (data_0.nc, data_1.nc, ...) or one file")
    named = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in files]
    if named == [None]:
        return files
    stems = {found and found[1] for found in named}
    if None in stems or len(stems) > 1:
        raise DataError(
            f"{folder} holds {', '.join(p.name for p in files)}; expected the chunks of one set (data_0.nc, data_1.nc, ...) or one file: "
            "put each set into a folder of its own"
        )
    digits = [found[2] for found in named if found]
    numbers = {path: int(number) for path, number in zip(files, digits, strict=True)}
    counted = Counter(numbers.values())
    stem, last = stems.pop(), max(counted)
    if twice := [n for n, times in counted.items() if times > 1]:
        raise DataError(f"{folder} holds chunk {twice[0]} twice ({', '.join(p.name for p in files if numbers[p] == twice[0])})")
    if missing := [n for n in range(last) if n not in counted]:
        first = digits[0]
        width = len(first) if first.startswith("0") else 1
        names = ", ".join(f"{stem}{n:0{width}}.nc" for n in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DataError(
            f"{folder} lacks {names} before {stem}{last:0{width}}.nc; the splits count from the end of the whole set: get the missing "
            "chunks, or give a single chunk as the data and no split"
        )
    return sorted(files, key=numbers.__getitem__) if order == "numeric" else files  # entries come sorted as strings


def _dimension_names(data: h5py.Dataset) -> tuple[str, ...]:
    """Return the names of the axes from NetCDF4's dimension scales; empty strings where there are none."""
    return tuple(dim[0].name.rpartition("/")[2] if len(dim) else dim.label for dim in data.dims)
