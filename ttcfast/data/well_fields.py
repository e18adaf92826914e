"""Fields of any physics in The Well's layout: which channels a file holds, on what grid, and how each is read.

A field of ``t0_fields`` is one channel, one of ``t1_fields`` a channel per component (``velocity_x``), one of ``t2_fields`` a channel per
pair of components (``stress_xy``). Source: the description of the data format in The Well's repository (PolymathicAI).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime import hdf5
from ttcfast.runtime.files import parse_json
from ttcfast.spec import FieldSpec, StateSpec

from .reader import held, spacing, values

GROUPS = ("t0_fields", "t1_fields", "t2_fields")
AXES = ("x", "y", "z")
LAYOUT = "ttcfast_layout"
"""Root attribute: JSON of ``StateSpec.to_meta()``, whose entries override what the file says or cannot say."""


@dataclass(frozen=True)
class StoredField:
    """One data set of a file.

    Args:
        place: Name in the file: ``"t1_fields/velocity"``.
        names: Its channels, in the order in which the components are stored.
        sample, time: Whether it varies between trajectories, and in time; an axis along which it does not is not stored.
        axes: Whether it varies along each space axis; an axis along which it does not is not stored, or has one entry.
    """

    place: str
    names: tuple[str, ...]
    sample: bool
    time: bool
    axes: tuple[bool, ...]

    def read(self, file: h5py.File, i: int, start: int, stop: int, shape: Sequence[int]) -> Tensor:
        """Read frames ``start:stop`` of trajectory ``i`` as ``[stop - start, channels, *S]`` float32, expanded where it does not vary."""
        at = (i,) * self.sample + (slice(start, stop),) * self.time
        stored = torch.from_numpy(np.asarray(file[self.place][at]).astype(np.float32, copy=False))
        sizes = [cells if varies else 1 for cells, varies in zip(shape, self.axes, strict=True)]
        whole = stored.reshape(stop - start if self.time else 1, *sizes, len(self.names))
        return whole.expand(stop - start, *shape, len(self.names)).movedim(-1, 1)


def spatial_axes(file: h5py.File) -> tuple[str, ...]:
    """Return the names of the space axes, in order."""
    said = texts(file["dimensions"].attrs.get("spatial_dims", []))
    found = tuple(said) or tuple(name for name in AXES if name in file["dimensions"])
    if not 1 <= len(found) <= 3:
        raise ValueError(f"dimensions names {len(found)} space axes ({', '.join(found) or 'none'}); expected 1 to 3, such as x and y")
    return found


def stored_fields(file: h5py.File, axes: Sequence[str], frames: int, shape: tuple[int, ...]) -> tuple[list[StoredField], int]:
    """Return the fields in the order of the groups' ``field_names``, and the number of trajectories.

    Raises:
        ValueError: No field, a field that is listed but not there, or one whose shape does not fit the others, the times or the grid.
    """
    found: list[StoredField] = []
    counts: dict[str, int] = {}
    for rank, group in enumerate(GROUPS):
        if not isinstance(file.get(group), h5py.Group):
            continue
        listed = file[group].attrs.get("field_names")
        for name in sorted(file[group]) if listed is None else texts(listed):
            place = f"{group}/{name}"
            data = file.get(place)
            if not isinstance(data, h5py.Dataset):
                raise ValueError(f"{group} lists {name}, which is not there; found {held(file)}")
            if data.dtype.kind not in "fiub":
                raise ValueError(f"{place} is of {data.dtype}; expected real numbers")
            field = _stored(data, place, name, rank, axes, shape)
            _check_shape(data, field, rank, frames, shape)
            hdf5.require_held(data)
            if field.sample:
                counts[place] = data.shape[0]
            found.append(field)
    if not found:
        raise ValueError(f"{', '.join(GROUPS)} hold no field; found {held(file)}")
    if len(set(counts.values())) > 1:
        raise ValueError(f"fields hold other numbers of trajectories: {', '.join(f'{p} {n}' for p, n in counts.items())}")
    declared = int(np.asarray(file.attrs.get("n_trajectories", 1)).reshape(-1)[0])
    return found, next(iter(counts.values()), declared)


def described(file: h5py.File, fields: Sequence[StoredField], axes: Sequence[str], shape: tuple[int, ...], periodic: Any) -> StateSpec:
    """Return the layout of the channels: what the file says, overridden by its attribute ``ttcfast_layout`` where it has one.

    Fields that do not vary in time are ``given``. An axis whose coordinates are not evenly spaced gives cells of their own volumes.

    Raises:
        ValueError: The attribute is no layout, or names channels, dimensions or cells that the file does not have.
    """
    names = tuple(name for field in fields for name in field.names)
    layout = _declared(file)
    gas = layout is not None and "names" not in layout and "density" in layout
    known: dict[str, Any] = {"ndim": len(axes), "periodic": periodic, **_cells(file, axes, shape)}
    if gas:
        known.pop("spacing")
    else:
        chosen = (layout or {}).get("names", names)  # one name, or several
        known |= {"names": names, "given": [name for field in fields if not field.time for name in field.names if name in chosen]}
    try:
        spec = StateSpec.from_meta({**known, **(layout or {})})
    except (TypeError, ValueError, AttributeError) as error:
        said = str(error)
        raise ValueError(said if layout is None else f"its root attribute {LAYOUT} is no layout of its fields: {said}") from error
    wrong = [name for name in spec.names if name not in names] if not gas else []
    if wrong or (gas and spec.num_channels > len(names)):
        raise ValueError(f"its root attribute {LAYOUT} names {', '.join(wrong or spec.names)}; the file holds {', '.join(names)}")
    if spec.ndim != len(axes):
        raise ValueError(f"its root attribute {LAYOUT} has {spec.ndim} space dimensions; the file has {len(axes)}")
    volume = spec.cell_volume
    if torch.is_tensor(volume) and volume.ndim and tuple(volume.shape) != shape:
        raise ValueError(f"its root attribute {LAYOUT} has cell volumes {list(volume.shape)}; the file has cells {list(shape)}")
    mask, value = spec.boundary_mask, spec.boundary_value
    if mask is not None and tuple(mask.shape) != shape:
        raise ValueError(f"its root attribute {LAYOUT} has a boundary mask {list(mask.shape)}; the file has cells {list(shape)}")
    if torch.is_tensor(value) and not _broadcasts(tuple(value.shape), (spec.num_channels, *shape)):
        raise ValueError(f"its root attribute {LAYOUT} has boundary values {list(value.shape)}; they must broadcast to [C, *S] of the file")
    if isinstance(spec, FieldSpec) and spec.divergence_free and spec.spacing is None and torch.is_tensor(volume):
        raise ValueError("divergence_free needs evenly spaced coordinates, or a spacing; leave it out of the layout")
    return spec


def _broadcasts(sizes: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(sizes) <= len(to) and all(n in (1, m) for n, m in zip(reversed(sizes), reversed(to)))


def tensor_fields(names: Sequence[str], ndim: int) -> dict[str, tuple[str, ...]]:
    """Group channels by field: ``velocity_x`` and ``velocity_y`` are the components of ``velocity``, ``stress_xx`` to ``stress_yy`` those
    of ``stress``; a channel whose fellow components are missing is a field of its own.

    Args:
        names: Channels, in any order.
        ndim: Number of space dimensions.

    Returns:
        Channels by field, in the order in which The Well stores components; fields in the order of their first channels.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        stem, _, letters = name.rpartition("_")
        rank = len(letters)
        whole = tuple(f"{stem}_{''.join(each)}" for each in itertools.product(AXES[:ndim], repeat=rank)) if stem and rank in (1, 2) else ()
        complete = name in whole and set(whole) <= set(names) and stem not in names and ndim > 1
        if not complete:
            found[name] = (name,)
        elif stem not in found or len(found[stem]) == len(whole):
            found[stem] = whole
        else:  # a vector and a tensor of one name
            found[name] = (name,)
    return found


def scalars_of(file: h5py.File, count: int) -> dict[str, Tensor]:
    """Return the numbers that hold for whole trajectories, by name: float64 ``[]``, or ``[N]`` where they differ between trajectories."""
    group, found = file.get("scalars"), dict[str, Tensor]()
    for name in sorted(group) if isinstance(group, h5py.Group) else ():
        data = group[name]
        if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "fiu" or bool(data.attrs.get("time_varying", False)):
            continue
        read = torch.from_numpy(np.squeeze(hdf5.array(data) if data.ndim else np.asarray(data[()])).astype(np.float64))
        if read.ndim == 0 or tuple(read.shape) == (count,):
            found[name] = read
    return found


def layout_text(spec: StateSpec) -> str:
    """Return the layout as the text of the attribute ``ttcfast_layout``."""
    return json.dumps(spec.to_meta(boundary=True), sort_keys=True, allow_nan=False)


def texts(value: Any) -> list[str]:
    """Return the texts in an attribute that holds one or several."""
    return [v.decode() if isinstance(v, bytes) else str(v) for v in np.asarray(value).reshape(-1)]


def _stored(data: h5py.Dataset, place: str, name: str, rank: int, axes: Sequence[str], shape: tuple[int, ...]) -> StoredField:
    sizes = data.shape[len(data.shape) - rank :] if rank else ()
    letters = axes if not sizes or sizes[-1] == len(axes) else AXES[: sizes[-1]]
    channels = tuple("_".join([name, *(["".join(each)] if each else [])]) for each in itertools.product(letters, repeat=rank))
    varies = np.asarray(data.attrs.get("dim_varying", np.ones(len(shape), bool))).reshape(-1).astype(bool).tolist()
    if len(varies) != len(shape):
        raise ValueError(f"{place} has dim_varying {varies}; the file has {len(shape)} space axes")
    sample, time = (bool(np.asarray(data.attrs.get(f"{what}_varying", True)).reshape(-1)[0]) for what in ("sample", "time"))
    return StoredField(place, channels, sample, time, tuple(varies))


def _check_shape(data: h5py.Dataset, field: StoredField, rank: int, frames: int, shape: tuple[int, ...]) -> None:
    lead: list[int | str] = [*(["sample"] if field.sample else []), *([frames] if field.time else [])]
    part = round(len(field.names) ** (1 / rank)) if rank else 0
    kept = [cells for cells, varies in zip(shape, field.axes, strict=True) if varies]
    full = [cells if varies else 1 for cells, varies in zip(shape, field.axes, strict=True)]
    for sizes in (kept, full):
        wanted = [*lead, *sizes, *[part] * rank]
        if len(wanted) == data.ndim and all(isinstance(n, str) or n == m for n, m in zip(wanted, data.shape, strict=True)):
            return
    raise ValueError(
        f"{field.place} has shape {data.shape}; with {frames} times and {' x '.join(map(str, shape))} cells it should be "
        f"[{', '.join(map(str, [*lead, *full, *[part] * rank]))}]"
    )


def _declared(file: h5py.File) -> dict[str, Any] | None:
    if LAYOUT not in file.attrs:
        return None
    said = texts(file.attrs[LAYOUT])[0]
    try:
        found = parse_json(said)
    except ValueError as error:
        raise ValueError(f"its root attribute {LAYOUT} is no JSON ({error}); write json.dumps(spec.to_meta())") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"its root attribute {LAYOUT} is {said[:60]!r}; write json.dumps(spec.to_meta())")
    return dict(found)


def _cells(file: h5py.File, axes: Sequence[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """Return ``spacing`` and ``cell_volume`` of the coordinates: one distance per axis, or cells of their own volumes.

    Where the root attribute ``grid_type`` is not cartesian, axes named theta and phi are polar and azimuthal angles in radians, and r is a
    radius.
    """
    curved = texts(file.attrs.get("grid_type", "cartesian"))[0] != "cartesian" and {"theta", "phi"} & set(axes)
    try:
        if curved:
            raise ValueError("cells of a curved grid differ")
        steps = tuple(spacing(file, f"dimensions/{name}", cells) for name, cells in zip(axes, shape, strict=True))
        return {"spacing": steps, "cell_volume": math.prod(steps)}
    except ValueError:
        widths = [_widths(file, f"dimensions/{name}", cells) for name, cells in zip(axes, shape, strict=True)]
        if curved:
            widths = [width * _stretch(file, name, axes) for name, width in zip(axes, widths, strict=True)]
        volumes = widths[0]
        for own in widths[1:]:
            volumes = volumes.unsqueeze(-1) * own
        return {"spacing": None, "cell_volume": volumes}


def _stretch(file: h5py.File, name: str, axes: Sequence[str]) -> Tensor:
    """Return the factor ``[cells]`` by which the metric of polar or spherical coordinates widens cells along an axis."""
    x = torch.from_numpy(hdf5.array(values(file, f"dimensions/{name}", ["cells"])).astype(np.float64))
    if name == "r":
        return x.abs() ** len({"theta", "phi"} & set(axes))
    return x.sin().abs().clamp_min(1e-12) if name == "theta" and "phi" in axes else torch.ones_like(x)


def _widths(file: h5py.File, name: str, cells: int) -> Tensor:
    """Return the width of each cell, float64 ``[cells]``, between the midpoints of neighbouring centres."""
    x = torch.from_numpy(hdf5.array(values(file, name, ["cells"])).astype(np.float64))
    if len(x) != cells:
        raise ValueError(f"{name} has {len(x)} entries; the fields have {cells} cells along it")
    if cells == 1:
        return torch.ones(1, dtype=torch.float64)
    steps = x.diff()
    if not bool((steps > 0).all() or (steps < 0).all()):
        raise ValueError(f"{name} runs from {x[0]:g} to {x[-1]:g} and turns on the way; expected coordinates that rise or fall")
    steps = steps.abs()
    edges = torch.cat([steps[:1], steps, steps[-1:]])
    return (edges[1:] + edges[:-1]) / 2
