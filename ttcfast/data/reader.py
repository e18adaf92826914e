"""Base class of trajectory files of every format: lazy reads, state layout and times."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime import hdf5
from ttcfast.runtime.errors import DataError
from ttcfast.spec import EulerSpec, FieldSpec, StateSpec

Place = str | os.PathLike[str]
# Exceptions that h5py raises on an unexpected header.
_HEADER = (KeyError, OSError, ValueError, RuntimeError, IndexError, TypeError, AttributeError)
_LISTED = 12  # entries of a foreign file that an error names
ROUNDING = 1e-6
"""How far a value may lie outside a bound, relative to the bound or 1: what single precision leaves."""


class TrajectoryReader:
    """One file of trajectories, read lazily; only the header is held in memory.

    ``reader[i]`` is trajectory ``i`` as ``[T+1, C, *S]`` float32 in physical units, with the channels of ``spec``;
    ``read(i, start, stop)`` reads only frames ``start:stop``. Files are opened on demand and kept open within a limit (see
    ``hdf5.held_open``), so instances can be pickled for data-loader workers and any number of them can exist. Subclasses implement
    ``_read_header`` and ``_read``.

    Args:
        path: The file.

    Attributes:
        spec: State layout on this grid; ``gamma`` is a number, or a tensor ``[N]`` if it differs between trajectories.
        path: Absolute path, valid after a change of the working directory.
        times: ``[T+1]`` float64, at least two.
        shape: Cells per space dimension.
        spacing: Cell size along each dimension.
        parameters: Metadata on how the file was generated; empty for most files.
        scalars: Numbers that hold for whole trajectories, by name: float64 ``[]``, or ``[N]`` where they differ between trajectories.

    Raises:
        DataError: The file is missing, damaged, truncated, of another layout, or stores its values in other files; the message says what
            was found and what was expected. Reading raises it for unphysical values: not finite, of a gas a density or total energy that
            is not positive or a negative pressure, of other fields a value outside the bounds of ``spec``.
    """

    layout: ClassVar[str]
    """Owner of the layout, for messages: ``"The Well's"``."""
    remedy: ClassVar[str] = "copy it again"

    spec: StateSpec
    times: Tensor
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    parameters: dict[str, Any]
    scalars: dict[str, Tensor]
    _count: int

    def __init__(self, path: Place) -> None:
        self.path = Path(path)
        self.parameters, self.scalars = {}, {}
        try:
            with self._open() as file:
                self.path = Path(os.path.abspath(path))
                self._read_header(file)
                if len(self.times) < 2:
                    raise ValueError(f"its trajectories have {len(self.times)} frame; expected at least 2, a state and its successor")
        except _HEADER as error:
            said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            raise DataError(f"data file {path} is damaged or not in {self.layout} layout: {said}") from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"trajectory {i} of {len(self)} in {self.path}")
        return self.read(i % len(self))

    def read(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Read frames ``start:stop`` of trajectory ``i``: ``[stop - start, C, *S]`` float32.

        Raises:
            IndexError: There is no such trajectory or frame.
            DataError: The frames cannot be read.
        """
        stop = len(self.times) if stop is None else stop
        if not 0 <= i < len(self) or not 0 <= start <= stop <= len(self.times):
            raise IndexError(f"frames {start}:{stop} of trajectory {i}; {self.path} holds {len(self)} of {len(self.times)} frames")
        out = torch.empty((stop - start, self.spec.num_channels, *self.shape), dtype=torch.float32)
        try:
            with hdf5.held_open(self, self._open) as file:
                self._read(file, i, start, stop, out)
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"data file {self.path} is damaged: trajectory {i} cannot be read ({error}); {self.remedy}") from error
        self._require_physical(out, i, start)
        return out

    def close(self) -> None:
        """Close the file; the next read reopens it."""
        hdf5.close(self)

    def physics(self) -> dict[str, Any]:
        """Return what files read together must share besides ``times`` and gamma, by name."""
        spec = self.spec
        return {
            "grid": self.shape,
            "frames": len(self.times),
            "cell size": self.spacing,
            "periodic axes": spec.periodic_axes,
            "closed": isinstance(spec, EulerSpec) and spec.closed,
            "channels": (spec.variables, *spec.channels) if isinstance(spec, EulerSpec) else spec.names,
        }

    def _require_physical(self, states: Tensor, i: int, start: int) -> None:
        """Check all values in one pass; locate the frame only if a value is wrong."""
        spec, least = self.spec, list[tuple[str, int | None, bool]]()
        if isinstance(spec, FieldSpec):
            self._require_bounds(states, i, start, spec)
        if isinstance(spec, EulerSpec):
            least = [("density", spec.density, False), ("total energy", spec.energy, False), ("pressure", spec.pressure, True)]
        if not states.numel() or (
            bool(states.sum().isfinite())  # any value that is not finite makes the sum so; an overflowing sum is examined below
            and all(_above(states[:, c], zero) for _, c, zero in least if c is not None)
        ):
            return
        for t, state in enumerate(states, start):
            wrong = None if state.isfinite().all() else "values that are not finite"
            for name, channel, zero in least:
                if wrong is None and channel is not None and not _above(state[channel], zero):
                    wrong = f"a {name} of {float(state[channel].min()):g}"
            if wrong is not None:
                no = ", which no gas has" if least else ""
                raise DataError(f"data file {self.path}: trajectory {i} holds {wrong} in frame {t}{no}; {self.remedy}")

    def _require_bounds(self, states: Tensor, i: int, start: int, spec: FieldSpec) -> None:
        for channel, (low, high) in spec.bounded_channels.items() if states.numel() else ():
            own = states[:, channel].flatten(1)
            below, above = own.amin(1), own.amax(1)
            wrong = below < low - ROUNDING * max(1.0, abs(low)) if low is not None else torch.zeros(len(own), dtype=torch.bool)
            wrong |= above > high + ROUNDING * max(1.0, abs(high)) if high is not None else wrong
            if bool(wrong.any()):
                t, name = int(wrong.int().argmax()), spec.names[channel]
                raise DataError(
                    f"data file {self.path}: trajectory {i} holds {name} from {float(below[t]):g} to {float(above[t]):g} in frame "
                    f"{start + t}, outside its bounds ({low}, {high}); widen or leave out the bounds of {name} in the file's layout"
                )

    def _open(self) -> h5py.File:
        return open_file(self.path)

    def _read_header(self, file: h5py.File) -> None:
        """Set ``spec``, ``times``, ``shape`` and the number of trajectories; raise ``ValueError`` saying what was found and expected."""
        raise NotImplementedError

    def _read(self, file: h5py.File, i: int, start: int, stop: int, out: Tensor) -> None:
        """Fill ``out [stop - start, C, *S]``."""
        raise NotImplementedError


def _above(values: Tensor, zero: bool) -> bool:
    least = float(values.amin())  # NaN where there is one
    return least >= 0 if zero else least > 0


def open_file(path: Path) -> h5py.File:
    """Open ``path`` for reading; see ``hdf5.open_hdf5``."""
    return hdf5.open_hdf5(path, "data file", "make it with `ttcfast generate` or give another path")


def held(file: h5py.File) -> str:
    """List the data sets of a file with their shapes, for error messages."""
    found: list[str] = []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(f"{name} {list(item.shape)}" if item.shape else name)

    file.visititems(note)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (", ".join(sorted(found)[:_LISTED]) + more) or "nothing"


def values(file: h5py.File, name: str, shape: Sequence[int | str]) -> h5py.Dataset:
    """Return the data set ``name`` after checking it.

    Args:
        file: An open file.
        name: The data set, which must hold floating-point numbers.
        shape: One entry per axis: a required size, or a name for the message.

    Raises:
        ValueError: The data set is missing or of another shape or kind; the message says what was found and what was expected.
    """
    data = file.get(name)
    wanted = f"{name} [{', '.join(map(str, shape))}]"
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{wanted} was expected; found {held(file)}")
    fits = data.ndim == len(shape) and all(not isinstance(n, int) or n == m for n, m in zip(shape, data.shape, strict=True))
    if not fits or data.dtype.kind != "f":
        raise ValueError(f"{wanted} of floating-point numbers was expected; found {name} {list(data.shape)} of {data.dtype}")
    if len(shape) > 1:
        hdf5.require_held(data)
    return data


def space_axes(file: h5py.File, name: str) -> str:
    """Return the space axes of a field ``[sample, time, *S]``; one if there is no such field, so that ``values`` says what is missing."""
    field = file.get(name)
    return "xyz"[: field.ndim - 2] if isinstance(field, h5py.Dataset) and 3 <= field.ndim <= 5 else "x"


def number(name: str, value: Any) -> float:
    """Return the number stored in an attribute as a scalar, an array of length 1, or text.

    Raises:
        ValueError: The attribute holds something else.
    """
    held = np.asarray(value).reshape(-1)
    try:
        if len(held) == 1 and held.dtype.kind != "c":
            return float(held[0])
    except (TypeError, ValueError):
        pass
    raise ValueError(f"attribute {name} is {value!r}; expected one number")


def spacing(file: h5py.File, name: str, cells: int) -> float:
    """Return the step of the coordinate ``name``, which must hold ``cells`` evenly spaced numbers.

    Raises:
        ValueError: It does not; the message says what was found and what was expected.
    """
    x = hdf5.array(values(file, name, ["cells"])).astype(np.float64)
    if len(x) != cells:
        raise ValueError(f"{name} has {len(x)} entries; the fields have {cells} cells along it")
    if cells == 1:
        return 1.0
    steps = np.diff(x)
    mean = float(steps.mean())
    if not mean > 0 or np.abs(steps - mean).max() > 0.01 * mean:
        raise ValueError(
            f"{name} runs from {x[0]:g} to {x[-1]:g} in steps of {steps.min():g} to {steps.max():g}; expected one step above 0"
        )
    return mean


def instants(file: h5py.File, name: str, frames: int, *, published: int = 0) -> Tensor:
    """Return the times of the frames, ``[frames]`` float64, from ``name``, which may have ``published`` surplus entries at its end.

    Raises:
        ValueError: The number of times does not match or they do not increase.
    """
    times = hdf5.array(values(file, name, ["time"])).astype(np.float64)
    if len(times) not in (frames, frames + published):
        more = f", or {frames + published} as published" if published else ""
        raise ValueError(f"{name} has {len(times)} entries for {frames} frames; expected {frames}{more}")
    if not (np.diff(times[:frames]) > 0).all() or not np.isfinite(times[:frames]).all():
        raise ValueError(f"{name} does not increase from frame to frame")
    return torch.from_numpy(times[:frames].copy())
