"""Writing trajectories in The Well's HDF5 layout.

Groups ``dimensions`` (time and coordinates), ``boundary_conditions``, ``scalars``, and one group per tensor rank:
``t0_fields`` ``[B, T, *S]``, ``t1_fields`` ``[B, T, *S, D]``, ``t2_fields``. Source: the description of the data format
in The Well's repository (PolymathicAI).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from ttcfast.runtime import hdf5
from ttcfast.runtime.hdf5_writing import new_hdf5
from ttcfast.spec import EulerSpec, FieldSpec, StateSpec

from .well_fields import AXES, GROUPS, LAYOUT, layout_text, tensor_fields

CHECKSUM = "ttcfast_checksum"  # root attribute
BC_TYPES = {"periodic": "PERIODIC", "outflow": "OPEN", "reflecting": "WALL"}


def write_well(
    path: str | os.PathLike[str],
    trajectories: Tensor,
    times: Sequence[float],
    spec: StateSpec,
    *,
    dataset_name: str,
    boundary: Sequence[str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scalars: Mapping[str, float | Sequence[float]] | None = None,
    compression: str | None = None,
) -> None:
    """Write trajectories as one HDF5 file, atomically. HDF5 checksums cover fields and axes, ``header_checksum`` the rest.

    A gas is stored as density, momentum and energy on the unit square. Any other layout is stored channel by channel, where
    ``velocity_x`` and ``velocity_y`` make up the vector field ``velocity``; the root attribute ``ttcfast_layout`` keeps the whole layout,
    so that ``TrajectoryFile`` returns it. A ``given`` field that is the same in all frames is stored once per trajectory.

    Args:
        path: The file to write.
        trajectories: States ``[B, T, C, *S]`` in the layout of ``spec``; stored as float32. Those of a gas are conserved variables.
        times: Times of the frames, ``[T]``.
        spec: Layout of the channels. ``gamma`` is stored as a constant scalar; the coordinates of other layouts follow from ``distances``.
        dataset_name: Root attribute.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"`` per axis; None follows the ``periodic`` axes of ``spec``, the others
            being outflow.
        parameters: How the data were made, stored as JSON in the root attribute ``simulation_parameters``.
        scalars: Numbers that hold for whole trajectories, such as a viscosity: one, or one per trajectory ``[B]``.
        compression: HDF5 filter; None reads fastest.

    Raises:
        ValueError: Trajectories, times, boundary or scalars do not fit the layout or each other, or a gas is not in conserved variables.
        OutputError: The file cannot be written or the disk is full.
    """
    if trajectories.ndim != spec.ndim + 3:
        raise ValueError(f"trajectories have shape {tuple(trajectories.shape)}; expected [B, T, C, *S] with {spec.ndim} space axes")
    spec.check_state("trajectories", trajectories.flatten(0, 1), channel_axis=1)
    if len(times) != trajectories.shape[1]:
        raise ValueError(f"times has {len(times)} entries and trajectories {trajectories.shape[1]} frames; give one time per frame")
    if boundary is None:
        boundary = ["periodic" if wraps else "outflow" for wraps in spec.periodic_axes]
    if len(boundary) != spec.ndim or not set(boundary) <= set(BC_TYPES):
        raise ValueError(f"boundary is {tuple(boundary)}; give one of {', '.join(BC_TYPES)} for each of {spec.ndim} axes")
    array = trajectories.detach().cpu().float().numpy()
    fields, widths = (_gas(array, spec) if isinstance(spec, EulerSpec) else _fields(array, spec)), None
    if isinstance(spec, FieldSpec):
        if array.shape[2] != len(spec.names):
            raise ValueError(f"trajectories have {array.shape[2]} channels; the spec names {len(spec.names)}: {', '.join(spec.names)}")
        widths = spec.distances
    with new_hdf5(path, libver=("v110", "v110")) as file:
        file.attrs["dataset_name"] = dataset_name
        file.attrs["grid_type"] = "cartesian"
        file.attrs["n_spatial_dims"] = spec.ndim
        file.attrs["n_trajectories"] = array.shape[0]
        file.attrs["simulation_parameters"] = json.dumps(dict(parameters or {}), sort_keys=True)
        if isinstance(spec, FieldSpec):
            file.attrs[LAYOUT] = layout_text(spec)
        _dimensions(file, times, array.shape[3:], widths)
        _boundaries(file, boundary, array.shape[3:])
        _scalars(file, ({} if spec.gamma is None else {"gamma": float(spec.gamma)}) | dict(scalars or {}), array.shape[0])
        options = {"compression": compression, "shuffle": compression is not None}
        for group, held_fields in zip(GROUPS, fields, strict=True):
            held = file.create_group(group)
            held.attrs["field_names"] = list(held_fields)
            for name, values in held_fields.items():
                varies = values.ndim == array.ndim - 1 + GROUPS.index(group)  # in time
                # One chunk is one frame of one trajectory: what a training pair or a rollout step reads.
                chunks = (1, 1, *values.shape[2:]) if varies else (1, *values.shape[1:])
                data = held.create_dataset(name, data=np.ascontiguousarray(values), chunks=chunks, fletcher32=True, **options)
                _attributes(data, sample=True, time=varies)
                data.attrs["dim_varying"] = np.ones(spec.ndim, dtype=bool)
        file.attrs[CHECKSUM] = header_checksum(file)


def _gas(array: np.ndarray, spec: EulerSpec) -> tuple[dict[str, np.ndarray], ...]:
    """Return the fields of a gas by tensor rank."""
    if spec.variables != "conserved" or spec.energy is None:
        raise ValueError("spec has primitive variables; convert trajectories to conserved ones (ttcfast.data.to_spec)")
    momentum = np.moveaxis(array[:, :, list(spec.momentum)], 2, -1)
    return {"density": array[:, :, spec.density], "energy": array[:, :, spec.energy]}, {"momentum": momentum}, {}


def _fields(array: np.ndarray, spec: StateSpec) -> tuple[dict[str, np.ndarray], ...]:
    """Return the fields of other physics by tensor rank, components last, without the time axis where a given field is constant."""
    found: tuple[dict[str, np.ndarray], ...] = ({}, {}, {})
    for name, channels in tensor_fields(spec.names, spec.ndim).items():
        at = [spec.names.index(channel) for channel in channels]
        rank = round(math.log(len(channels), spec.ndim)) if len(channels) > 1 else 0  # ndim channels of a vector, ndim^2 of a tensor
        values = np.moveaxis(array[:, :, at], 2, -1)
        if set(at) <= set(spec.given_channels) and bool((values == values[:, :1]).all()):
            values = values[:, 0]
        found[rank][name] = values.reshape(*values.shape[:-1], *[spec.ndim] * rank)
    return found


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


def _scalars(file: h5py.File, scalars: Mapping[str, float | Sequence[float]], count: int) -> None:
    group = file.create_group("scalars")
    group.attrs["field_names"] = list(scalars)
    for name, given in scalars.items():
        value = np.asarray(given, np.float32)
        if value.ndim and value.shape != (count,):
            raise ValueError(f"scalars[{name!r}] has shape {value.shape}; give one number, or one per trajectory ({count},)")
        _attributes(group.create_dataset(name, data=value), sample=value.ndim > 0, time=False)


def _dimensions(file: h5py.File, times: Sequence[float], shape: tuple[int, ...], widths: Sequence[float] | None) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(AXES[: len(shape)])
    _attributes(_axis(group, "time", np.asarray(times, dtype=np.float32)), sample=False, time=True)
    for axis, (name, n) in enumerate(zip(AXES, shape, strict=False)):
        centres = (np.arange(n) + 0.5) / n if widths is None else (np.arange(n) + 0.5) * widths[axis]
        _attributes(_axis(group, name, centres.astype(np.float32)), sample=False, time=False)


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
