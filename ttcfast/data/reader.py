"""What every trajectory file offers, whatever its format: lazy pieces of trajectories, their layout, their times."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec

Place = str | os.PathLike[str]
# What h5py raises on a header that is not what we expect.
_HEADER = (KeyError, OSError, ValueError, RuntimeError, IndexError, TypeError, AttributeError)
_LISTED = 12  # entries of a foreign file that an error names


class TrajectoryReader:
    """One file of trajectories, read piece by piece; nothing but its header is held.

    ``reader[i]`` is trajectory ``i`` as ``[T+1, C, *S]`` float32 in physical units, channels as ``spec`` names them;
    ``read(i, start, stop)`` reads frames ``start:stop`` of it alone. The file is opened at the first read of each process, so an instance
    may be pickled and handed to data-loader workers. A subclass writes ``_read_header`` and ``_read``.

    Args:
        path: the file.

    Attributes:
        spec: the state's layout on this grid; ``gamma`` a number, or a tensor ``[N]`` where it differs between the file's trajectories.
        times: ``[T+1]`` float64.
        shape: space dimensions. parameters: what the file says about how it was made (empty for most).

    Raises:
        DataError: the file is missing, damaged, truncated, or of another layout; the message says what was found and what was expected.
    """

    layout: ClassVar[str]
    """Whose layout it is, for messages: ``"The Well's"``."""
    remedy: ClassVar[str] = "copy it again"

    spec: StateSpec
    times: Tensor
    shape: tuple[int, ...]
    parameters: dict[str, Any]
    _count: int

    def __init__(self, path: Place) -> None:
        self.path = Path(path)
        self.parameters = {}
        self._file: h5py.File | None = None
        self._process = -1
        file = self._open()
        try:
            self._read_header(file)
        except _HEADER as error:
            self.close()
            said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
            raise DataError(f"data file {path} is damaged or not in {self.layout} layout: {said}") from error

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"trajectory {i} of {len(self)} in {self.path}")
        return self.read(i % len(self))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_process": -1}

    def read(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Frames ``start:stop`` of trajectory ``i``: ``[stop - start, C, *S]`` float32.

        Raises:
            IndexError: no such trajectory or frames. DataError: they cannot be read.
        """
        stop = len(self.times) if stop is None else stop
        if not 0 <= i < len(self) or not 0 <= start <= stop <= len(self.times):
            raise IndexError(f"frames {start}:{stop} of trajectory {i}; {self.path} holds {len(self)} of {len(self.times)} frames")
        out = torch.empty((stop - start, self.spec.num_channels, *self.shape), dtype=torch.float32)
        try:
            self._read(self._open(), i, start, stop, out)
        except (OSError, RuntimeError, KeyError) as error:
            raise DataError(f"data file {self.path} is damaged: trajectory {i} cannot be read ({error}); {self.remedy}") from error
        return out

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def physics(self) -> dict[str, object]:
        """What files read together must share, by name; ``gamma`` may be a list, one per trajectory."""
        spec, step = self.spec, self.times.diff()
        return {
            "grid": self.shape,
            "frames": len(self.times),
            "time step": round(float(step.mean()), 6) if len(step) else 0.0,
            "gamma": spec.gamma.tolist() if torch.is_tensor(spec.gamma) else spec.gamma,
            "cell volume": spec.cell_volume,
            "periodic axes": spec.periodic_axes,
            "closed": spec.closed,
            "channels": (spec.variables, *spec.channels),
        }

    def _open(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():
            self._file = open_file(self.path, self.remedy)
            self._process = os.getpid()
        return self._file

    def _read_header(self, file: h5py.File) -> None:
        """Set ``spec``, ``times``, ``shape`` and the number of trajectories; raise ``ValueError`` saying what was found and expected."""
        raise NotImplementedError

    def _read(self, file: h5py.File, i: int, start: int, stop: int, out: Tensor) -> None:
        """Fill ``out [stop - start, C, *S]``."""
        raise NotImplementedError


def open_file(path: Path, remedy: str) -> h5py.File:
    """``path`` opened for reading.

    Raises:
        DataError: it is missing, truncated or no HDF5 (NetCDF4) file.
    """
    if not path.is_file():
        raise DataError(f"data file {path} does not exist; make it with `ttcfast generate` or give another path")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"data file {path} is truncated or no HDF5 file ({error}); make or copy it again") from error


def held(file: h5py.File) -> str:
    """The data sets of a file with their shapes, for a message about what was found."""
    found: list[str] = []

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found.append(f"{name} {list(item.shape)}" if item.shape else name)

    file.visititems(note)
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return (", ".join(sorted(found)[:_LISTED]) + more) or "nothing"


def values(file: h5py.File, name: str, shape: Sequence[int | str]) -> h5py.Dataset:
    """The data set ``name``, if it holds floating-point numbers on as many axes as ``shape`` names (numbers there are sizes it must have).

    Raises:
        ValueError: naming what was found and what was expected.
    """
    data = file.get(name)
    wanted = f"{name} [{', '.join(map(str, shape))}]"
    if not isinstance(data, h5py.Dataset):
        raise ValueError(f"{wanted} was expected; found {held(file)}")
    fits = data.ndim == len(shape) and all(not isinstance(n, int) or n == m for n, m in zip(shape, data.shape, strict=True))
    if not fits or data.dtype.kind != "f":
        raise ValueError(f"{wanted} of floating-point numbers was expected; found {name} {list(data.shape)} of {data.dtype}")
    return data


def spacing(file: h5py.File, name: str, cells: int) -> float:
    """Distance between neighbouring entries of the coordinate ``name``, which must be ``cells`` evenly spaced numbers.

    Raises:
        ValueError: naming what was found and what was expected.
    """
    x = np.asarray(values(file, name, ["cells"]), dtype=np.float64)
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
    """The times of the frames, ``[frames]`` float64, in ``name``, which may have ``published`` more entries at its end.

    Raises:
        ValueError: naming what was found and what was expected.
    """
    times = np.asarray(values(file, name, ["time"]), dtype=np.float64)
    if len(times) not in (frames, frames + published):
        more = f", or {frames + published} as published" if published else ""
        raise ValueError(f"{name} has {len(times)} entries for {frames} frames; expected {frames}{more}")
    if not (np.diff(times[:frames]) > 0).all():
        raise ValueError(f"{name} does not increase from frame to frame")
    return torch.from_numpy(times[:frames].copy())
