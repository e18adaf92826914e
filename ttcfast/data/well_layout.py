"""Writing trajectories in The Well's HDF5 layout.

Groups ``dimensions`` (time and coordinates), ``boundary_conditions``, ``scalars``, and one group per tensor rank:
``t0_fields`` ``[B, T, *S]``, ``t1_fields`` ``[B, T, *S, D]``, ``t2_fields``. Source: the description of the data format
in The Well's repository (PolymathicAI).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from ttcfast.runtime import hdf5
from ttcfast.runtime.hdf5_writing import new_hdf5
from ttcfast.spec import EulerSpec

AXES = ("x", "y", "z")
CHECKSUM = "ttcfast_checksum"  # root attribute
BC_TYPES = {"periodic": "PERIODIC", "outflow": "OPEN", "reflecting": "WALL"}


def write_well(
    path: str | os.PathLike[str],
    trajectories: Tensor,
    times: Sequence[float],
    spec: EulerSpec,
    *,
    dataset_name: str,
    boundary: Sequence[str],
    parameters: Mapping[str, Any],
    compression: str | None = None,
) -> None:
    """Write trajectories as one HDF5 file, atomically. HDF5 checksums cover fields and axes, ``header_checksum`` the rest.

    Args:
        path: The file to write.
        trajectories: Conserved states ``[B, T, C, *S]`` in the layout of ``spec``, on the unit square; stored as float32.
        times: Times of the frames, ``[T]``.
        spec: Layout of the channels; ``gamma`` is stored as a constant scalar.
        dataset_name: Root attribute.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"`` per axis.
        parameters: How the data were made, stored as JSON in the root attribute ``simulation_parameters``.
        compression: HDF5 filter; None reads fastest.

    Raises:
        OutputError: The file cannot be written or the disk is full.
    """
    spec.check_state("trajectories", trajectories, channel_axis=2)
    array = trajectories.detach().cpu().float().numpy()
    with new_hdf5(path, libver=("v110", "v110")) as file:
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
                data = held.create_dataset(name, data=np.ascontiguousarray(values), chunks=chunks, fletcher32=True, **options)
                _attributes(data, sample=True, time=True)
                data.attrs["dim_varying"] = np.ones(spec.ndim, dtype=bool)
        file.attrs[CHECKSUM] = header_checksum(file)


def header_checksum(file: h5py.File) -> np.uint32:
    """Return the CRC-32 of everything in a file except its fields: names, shapes, attributes (except this one), axes and scalars.

    HDF5's checksums do not cover these, or only their place in the file. HDF5's heap of strings remains uncovered: it has no checksum, and
    HDF5 may loop in a damaged one before it returns a value.
    """
    total = _crc({k: v for k, v in file.attrs.items() if k != CHECKSUM}, 0)
    names: list[str] = []
    file.visit(names.append)
    for name in sorted(names):
        item = file[name]
        total = _crc(item.attrs, zlib.crc32(name.encode(), total))
        if isinstance(item, h5py.Dataset):
            total = zlib.crc32(f"{item.shape}{item.dtype}".encode(), total)
            if item.ndim < 2:
                total = zlib.crc32((hdf5.array(item) if item.ndim else np.asarray(item[()])).tobytes(), total)
    return np.uint32(total)


def _crc(attributes: Mapping[str, Any], total: int) -> int:
    return zlib.crc32(repr([(name, np.asarray(attributes[name]).tolist()) for name in sorted(attributes)]).encode(), total)


def _dimensions(file: h5py.File, times: Sequence[float], shape: tuple[int, ...]) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(AXES[: len(shape)])
    _attributes(_axis(group, "time", np.asarray(times, dtype=np.float32)), sample=False, time=True)
    for name, n in zip(AXES, shape, strict=False):
        _attributes(_axis(group, name, ((np.arange(n) + 0.5) / n).astype(np.float32)), sample=False, time=False)


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
        _axis(side, "mask", mask)


def _axis(group: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
    return group.create_dataset(name, data=values, chunks=values.shape, fletcher32=True)  # in chunks, as HDF5's checksums need


def _attributes(data: h5py.Dataset, *, sample: bool, time: bool) -> None:
    data.attrs["sample_varying"], data.attrs["time_varying"] = sample, time
