"""Comparison of the grids, times and physics of data files, with one relative tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.spec import EulerSpec, StateSpec

from .reader import TrajectoryReader

# Above the rounding of a step between coordinates or times in single precision, below any difference that is meant.
RELATIVE = 1e-4
_SINGLE = 2.0**-23


def agree(a: Any, b: Any, rounding: float = 0.0) -> bool:
    """Return whether numbers or arrays agree within the relative tolerance ``RELATIVE`` plus ``rounding``; NaN equals NaN."""
    return bool(np.allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=RELATIVE, atol=rounding, equal_nan=True))


Difference = tuple[str, str, str]  # what differs, and its value in each, as text


def times_difference(a: Tensor, b: Tensor) -> Difference | None:
    """Return the first difference between the times ``[T+1]`` of two files, or None."""
    if torch.equal(a, b):
        return None
    if len(a) != len(b):
        return "frames", str(len(a)), str(len(b))
    one, other = a.double().numpy(), b.double().numpy()
    steps, wanted = np.diff(one), np.diff(other)
    rounding = _SINGLE * max(np.abs(one).max(), np.abs(other).max())
    different = np.flatnonzero(~np.isclose(steps, wanted, rtol=RELATIVE, atol=rounding))
    if len(different):
        k = int(different[0])
        return f"time step {k + 1} of", f"{steps[k]:g}", f"{wanted[k]:g}"
    if abs(one[0] - other[0]) > RELATIVE * wanted.min(initial=np.inf) + rounding:
        return "its first frame at time", f"{one[0]:g}", f"{other[0]:g}"
    return None


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> Difference | None:
    """Return the first entry in which two descriptions differ, or None; floating-point numbers are compared by ``agree``."""
    for name in dict.fromkeys([*a, *b]):
        one, other = a.get(name), b.get(name)
        if one == other or (_is_measured(one) and _is_measured(other) and np.shape(one) == np.shape(other) and agree(one, other)):
            continue
        return name, _told(one), _told(other)
    return None


def spec_difference(a: StateSpec, b: StateSpec) -> Difference | None:
    """Return the first difference between two state layouts, or None; a gamma per trajectory is ignored."""
    return difference(_described(a), _described(b))


def require_alike(files: Sequence[TrajectoryReader], *, gamma: bool = True) -> None:
    """Require all files to share grid, times and physics.

    Args:
        files: At least one.
        gamma: Require one common gamma as well.

    Raises:
        DataError: Files differ; the message names the first difference.
    """
    first = files[0]
    for file in files if gamma else ():
        if torch.is_tensor(file.spec.gamma) and file.spec.gamma.ndim:
            raise DataError(f"data file {file.path} has a gamma per trajectory; what is asked for needs one for all")
    described = first.physics() | ({"gamma": _one_gamma(first.spec)} if gamma else {})
    for other in files[1:]:
        found = difference(other.physics() | ({"gamma": _one_gamma(other.spec)} if gamma else {}), described)
        if found := found or times_difference(other.times, first.times):
            name, one, wanted = found
            raise DataError(f"data file {other.path} has {name} {one}; {first.path} has {wanted}: read them in two runs")


def require_made_with(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ``DataError`` where the data file ``path`` was made with other settings than ``wanted``, which resuming must not mix."""
    if different := [f"{k} {found.get(k)!r} instead of {v!r}" for k, v in wanted.items() if found.get(k) != v]:
        raise DataError(f"{path} was made with other settings ({', '.join(different)}); give another out= or remove it")


def _described(spec: StateSpec) -> dict[str, Any]:
    volume = spec.cell_volume
    return {
        "variables": spec.variables if isinstance(spec, EulerSpec) else "fields",
        "channels": spec.channels if isinstance(spec, EulerSpec) else spec.names,
        "dimensions": spec.ndim,
        "gamma": _one_gamma(spec),
        "cell volume": volume.tolist() if torch.is_tensor(volume) else volume,
        "periodic axes": spec.periodic_axes,
        "closed": isinstance(spec, EulerSpec) and spec.closed,
    }


def _one_gamma(spec: StateSpec) -> float | None:
    several = torch.is_tensor(spec.gamma) and spec.gamma.ndim > 0
    return None if several or spec.gamma is None else float(spec.gamma)


def _is_measured(value: Any) -> TypeGuard[float | Sequence[float]]:
    """Return whether the value is floating-point; counts are compared exactly."""
    return value is not None and np.asarray(value).dtype.kind == "f"


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"({', '.join(map(_told, value))})" if isinstance(value, tuple) else str(value)
