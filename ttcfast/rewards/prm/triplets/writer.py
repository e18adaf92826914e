"""Writes triplet files so that an interrupted writer, or one whose disk is full, leaves a file that the next writer continues."""

from __future__ import annotations

import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import atomic_path, disk_errors, parse_json, reserve
from ttcfast.runtime.hdf5_writing import edit_hdf5

from .file import CHECKSUM, FORMAT, FRAMES, HEADER_ERRORS, VERSION, TripletHeader, checksum, frame_sums, opened


class TripletWriter:
    """Fills ``path`` in order, continuing where an interrupted writer of the same samples stopped.

    Args:
        path: Unfinished file.
        header: Metadata of the samples.
        count: Number of samples, M.
        shape: Shape of a state, ``(C, *S)``.

    Attributes:
        done: Samples written so far.

    Raises:
        DataError: An unfinished file exists that is damaged or of other samples.
        OutputError: The disk is full, or another process is writing.
    """

    def __init__(self, path: Path, header: TripletHeader, count: int, shape: tuple[int, ...]) -> None:
        self.path = path
        if path.exists():
            require_same(path, header, count, shape)
        else:
            self._create(header, count, shape)
        self._places: dict[str, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}
        with opened(path) as held:
            for name in held:
                if isinstance(held[name], h5py.Dataset):
                    offset = held[name].id.get_offset()
                    if offset is None:
                        raise DataError(
                            f"{path} is no longer in the layout that it was created with ({name} has no fixed place); remove it"
                        )
                    self._places[name] = (offset, held[name].dtype, held[name].shape[1:])
            self.done = int(held["done"][0])
        self._file = FileIO(path, "r+")

    def append(self, **values: np.ndarray) -> None:
        """Adds samples: one keyword per data set, whose first axis is the samples."""
        stop = self.done + len(values["errors"])
        with disk_errors(self.path):
            for name, value in {**values, "sums": frame_sums(values["frames"])}.items():
                if name in self._places:  # files that an older version created have no sums
                    self._put(name, self.done, value)
            os.fsync(self._file)
            self._put("done", 0, np.array([stop]))  # after the samples that it counts
            os.fsync(self._file)
        self.done = stop

    def read(self, name: str) -> np.ndarray:
        """Returns the samples of a data set that have been written."""
        offset, dtype, shape = self._places[name]
        flat = np.fromfile(self.path, dtype, self.done * math.prod(shape), offset=offset)
        return flat.reshape(self.done, *shape)

    def complete(self) -> None:
        """Marks the file as complete."""
        with disk_errors(self.path):
            with edit_hdf5(self.path, "r+") as file:
                if CHECKSUM in file.attrs:
                    file.attrs.modify(CHECKSUM, np.uint32(checksum(file)))
                file.attrs.modify("complete", np.bool_(True))
            os.fsync(self._file)

    def close(self) -> None:
        self._file.close()

    def _put(self, name: str, row: int, value: np.ndarray) -> None:
        offset, dtype, shape = self._places[name]
        left = np.ascontiguousarray(value, dtype).reshape(-1).view(np.uint8).data
        place = offset + row * dtype.itemsize * math.prod(shape)
        while len(left):  # a write may end early when the disk is full
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written

    def _create(self, header: TripletHeader, count: int, shape: tuple[int, ...]) -> None:
        k = int(header.config["K"])
        layout: dict[str, tuple[tuple[int, ...], type]] = {
            "frames": ((count, len(FRAMES), *shape), np.float32),
            "errors": ((count, k), np.float32),
            "picked": ((count, 3), np.int64),
            "step": ((count,), np.int64),
            "trajectory": ((count,), np.int64),
            "on_policy": ((count,), np.bool_),
            "done": ((1,), np.int64),
            "sums": ((count, len(FRAMES)), np.uint64),
        }
        with atomic_path(self.path) as fresh:
            with edit_hdf5(fresh, "w") as file:
                file.attrs.update({"format": FORMAT, "version": VERSION, "complete": np.bool_(False), **header.attributes()})
                file.attrs[CHECKSUM] = np.uint32(0)  # a placeholder; see complete
                for name in ("mean", "std", "delta_std"):
                    file[f"normalizer/{name}"] = getattr(header.normalizer, name).detach().cpu().float().numpy()
                for name, (size, dtype) in layout.items():
                    data = file.create_dataset(name, size, dtype)
                    data[(-1,) * len(size)] = 0  # HDF5 allocates a data set at the first write
            reserve(fresh)


def require_same(path: Path, header: TripletHeader, count: int, shape: tuple[int, ...]) -> None:
    """Raises ``DataError`` unless the file, complete or not, is a triplet file of these samples."""
    remedy = "give another out=, or remove it"
    with opened(path) as file:
        try:
            if file.attrs.get("format") != FORMAT:
                raise DataError(f"{path} exists and is not a triplet file; {remedy}")
            found = {name: str(file.attrs[name]) for name in ("surrogate", "spec", "config")}
            sizes = (file["frames"].shape[0], tuple(file["frames"].shape[2:]))
            done = int(file["done"][0])
            before = dict(parse_json(found["config"]))
        except HEADER_ERRORS as error:
            raise DataError(f"{path} exists and is damaged ({error}); {remedy}") from error
    expected = header.attributes()
    if found["surrogate"] != expected["surrogate"]:
        raise DataError(
            f"{path} was made with another surrogate ({found['surrogate'][:12]} instead of {expected['surrogate'][:12]}): triplets of two "
            f"surrogates are not mixed; {remedy}"
        )
    now = parse_json(expected["config"])
    before.setdefault("time_step", now.get("time_step"))  # older files do not store it
    different = [f"{k} {before.get(k)!r} instead of {now.get(k)!r}" for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    if different or found["spec"] != expected["spec"] or sizes != (count, shape) or done > count:
        said = (
            ", ".join(different) or f"{sizes[0]} samples of shape {list(sizes[1])} instead of {count} of {list(shape)}, or another layout"
        )
        raise DataError(f"{path} was made with other settings ({said}); {remedy}")
