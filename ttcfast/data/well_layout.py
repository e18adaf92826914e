"""Writing trajectories in The Well's HDF5 layout.

Groups ``dimensions`` (time and coordinates), ``boundary_conditions``, ``scalars``, and one group per tensor rank:
``t0_fields`` ``[B, T, *S]``, ``t1_fields`` ``[B, T, *S, D]``, ``t2_fields``. Source: docs/data_format.md of The Well (PolymathicAI).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from ttcfast.runtime.files import atomic_path
from ttcfast.spec import StateSpec

AXES = ("x", "y", "z")
BC_TYPES = {"periodic": "PERIODIC", "outflow": "OPEN", "reflecting": "WALL"}


def write_well(
    path: str | os.PathLike[str],
    trajectories: Tensor,
    times: Sequence[float],
    spec: StateSpec,
    *,
    dataset_name: str,
    boundary: Sequence[str],
    parameters: Mapping[str, Any],
    compression: str | None = None,
) -> None:
    """Write trajectories as one HDF5 file, beside and renamed.

    Args:
        path: the file to make.
        trajectories: ``[B, T, C, *S]`` conserved states in the layout of ``spec``, on the unit square; stored as float32.
        times: ``[T]`` instants.
        spec: names the channels; ``gamma`` is stored as a constant scalar.
        dataset_name: root attribute.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"`` per axis.
        parameters: how the data were made; kept as JSON in the root attribute ``simulation_parameters``.
        compression: HDF5 filter; None reads fastest.

    Raises:
        OutputError: the place cannot be written or the disk is full.
    """
    spec.check_state("trajectories", trajectories, channel_axis=2)
    array = trajectories.detach().cpu().float().numpy()
    with atomic_path(path) as place, h5py.File(place, "w") as file:
        file.attrs["dataset_name"] = dataset_name
        file.attrs["grid_type"] = "cartesian"
        file.attrs["n_spatial_dims"] = spec.ndim
        file.attrs["n_trajectories"] = array.shape[0]
        file.attrs["simulation_parameters"] = json.dumps(dict(parameters), sort_keys=True)
        _dimensions(file, times, array.shape[3:])
        _boundaries(file, boundary, array.shape[3:])
        gamma = float(spec.gamma)
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = ["gamma"]
        _attributes(scalars.create_dataset("gamma", data=np.float32(gamma)), sample=False, time=False)
        options = {"compression": compression, "shuffle": compression is not None}
        assert spec.energy is not None
        scalar_fields = {"density": array[:, :, spec.density], "energy": array[:, :, spec.energy]}
        momentum = np.moveaxis(array[:, :, list(spec.momentum)], 2, -1)
        for group, fields in (("t0_fields", scalar_fields), ("t1_fields", {"momentum": momentum}), ("t2_fields", {})):
            held = file.create_group(group)
            held.attrs["field_names"] = list(fields)
            for name, values in fields.items():
                # One chunk is one frame of one trajectory: what a training pair or a rollout step reads.
                chunks = (1, 1, *values.shape[2:])
                data = held.create_dataset(name, data=np.ascontiguousarray(values), chunks=chunks, **options)
                _attributes(data, sample=True, time=True)
                data.attrs["dim_varying"] = np.ones(spec.ndim, dtype=bool)


def _dimensions(file: h5py.File, times: Sequence[float], shape: tuple[int, ...]) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(AXES[: len(shape)])
    _attributes(group.create_dataset("time", data=np.asarray(times, dtype=np.float32)), sample=False, time=True)
    for name, n in zip(AXES, shape, strict=False):
        _attributes(group.create_dataset(name, data=((np.arange(n) + 0.5) / n).astype(np.float32)), sample=False, time=False)


def _boundaries(file: h5py.File, kinds: Sequence[str], shape: tuple[int, ...]) -> None:
    group = file.create_group("boundary_conditions")
    for name, kind, n in zip(AXES, kinds, shape, strict=False):
        side = group.create_group(f"{name}_{BC_TYPES[kind].lower()}")
        side.attrs["bc_type"] = BC_TYPES[kind]
        side.attrs["associated_dims"] = [name]
        side.attrs["associated_fields"] = []
        side.attrs["sample_varying"] = side.attrs["time_varying"] = False
        mask = np.zeros(n, dtype=bool)
        mask[[0, -1]] = True
        side.create_dataset("mask", data=mask)


def _attributes(data: h5py.Dataset, *, sample: bool, time: bool) -> None:
    data.attrs["sample_varying"], data.attrs["time_varying"] = sample, time
