"""Lazy reading of PDEBench's compressible flows (1D_CFD, 2D_CFD, 3D_CFD): HDF5 files of primitive variables."""

from __future__ import annotations

import math
import os
import re
import warnings
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.spec import StateSpec

from .reader import TrajectoryReader, instants, number, space_axes, spacing, values

VELOCITIES = ("Vx", "Vy", "Vz")
COORDINATES = ("x-coordinate", "y-coordinate", "z-coordinate")


class PDEBenchFile(TrajectoryReader):
    """One HDF5 file of PDEBench's compressible Navier-Stokes sets; see ``TrajectoryReader``.

    ``density``, ``pressure``, ``Vx`` (``Vy``, ``Vz``), each ``[N, T+1, *S]``, with ``x-coordinate`` (...) at the cell centres and
    ``t-coordinate``. The channels are those of ``StateSpec.pdebench``, (Vx, Vy, density, pressure), with as many velocities as dimensions.

    Args:
        path: The ``.hdf5`` file.
        gamma: Ratio of specific heats, which the files do not store; None takes 5/3.
        periodic: Whether the domain is periodic. None derives it from the file name (``..._periodic_...``, or ``..._trans_...`` for
            outflow); a name that states neither is taken as open, with a warning, so that conservation is not imposed.

    Attributes:
        spec: State layout; ``cell_volume`` follows from the coordinates.
        times: ``t-coordinate``, without its last entry if it has one more than there are frames, as in the published files.
        parameters: The attributes ``eta`` and ``zeta`` (viscosities) and ``M`` (Mach number), if the file has them.

    Raises:
        DataError: The file is missing, damaged, truncated or of another layout (PDEBench's other equations store ``tensor``).

    Source: the data generator of PDEBench (Takamoto et al., PDEBench: An Extensive Benchmark for Scientific Machine Learning, 2022).
    """

    layout = "PDEBench's"

    def __init__(self, path: str | os.PathLike[str], *, gamma: float | None = None, periodic: bool | None = None) -> None:
        self._gamma, self._periodic = 5 / 3 if gamma is None else gamma, periodic
        super().__init__(path)

    def physics(self) -> dict[str, Any]:
        return {**super().physics(), **self.parameters}

    def _read_header(self, file: h5py.File) -> None:
        density = values(file, "density", ["sample", "time", *space_axes(file, "density")])
        self._count, frames, self.shape = density.shape[0], density.shape[1], tuple(density.shape[2:])
        if not self._count or not frames:
            raise ValueError(f"density {list(density.shape)} holds no trajectory")
        ndim = len(self.shape)
        self._names = (*VELOCITIES[:ndim], "density", "pressure")
        for name in self._names:
            values(file, name, density.shape)
        self.spacing = tuple(spacing(file, name, cells) for name, cells in zip(COORDINATES, self.shape, strict=False))
        self.times = instants(file, "t-coordinate", frames, published=1)
        self.parameters = {name: number(name, file.attrs[name]) for name in ("eta", "zeta", "M") if name in file.attrs}
        self.spec = StateSpec.pdebench(
            momentum=tuple(range(ndim)),
            density=ndim,
            pressure=ndim + 1,
            ndim=ndim,
            gamma=self._gamma,
            cell_volume=math.prod(self.spacing),
            periodic=self._named_periodic() if self._periodic is None else self._periodic,
        )

    def _named_periodic(self) -> bool:
        found = re.search(r"(?:^|_)(periodic|trans)(?:_|$)", self.path.stem)
        if found is None:
            warnings.warn(
                f"the name of {self.path} says neither periodic nor trans, and the file does not say its boundary; it counts as open, so "
                "conservation is not imposed: give periodic=true where it is",
                stacklevel=2,
            )
        return found is not None and found.group(1) == "periodic"

    def _read(self, file: h5py.File, i: int, start: int, stop: int, out: Tensor) -> None:
        for channel, name in enumerate(self._names):
            out[:, channel] = torch.from_numpy(file[name][i, start:stop].astype(np.float32, copy=False))
