"""Presents triplets as a map-style data set: our HDF5 files, or the plan's ``.pt`` files of one sample each."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ttcfast.data.alike import spec_difference
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import entries, require_regular
from ttcfast.runtime.units import require_units

from .sketch_files import TRIPLET_KEYS, load_triplet_file
from .triplets.build import build_triplets
from .triplets.file import FILE_NAME, SUFFIXES, Place, TripletFile

__all__ = ["PRMTripletSet", "build_triplets"]

Sample = tuple[Tensor, Tensor, Tensor, Tensor]


class PRMTripletSet(Dataset[Sample]):
    """Data set of ``(state, best, median, worst)``, each ``[C, *S]`` float32 in physical units.

    Frames are read on access, except that the first ``.pt`` file is opened at once for the shape if there are no triplet files. Each
    process (data-loader worker) opens the files itself. Loops over one file read fastest with ``TripletFile.frames(indices, first=4,
    out=...)``, which avoids the copies of a ``DataLoader``.

    Args:
        manifest_paths: One or several of: triplet files, ``.pt`` files of the plan (a dict of the tensors ``state_t``, ``best``, ``med``,
            ``worst``), folders of either, or ``.txt`` files that name one of these per line, relative to themselves. Samples keep this
            order. Triplet and ``.pt`` files may be mixed here; ``train_prm`` requires one kind.

    Attributes:
        paths: Sample files.
        parts: Reader of each file.
        shape: ``(C, *S)`` of every state.

    Raises:
        DataError: No path is given; one is missing, empty, damaged or holds something else; or files differ in shape, surrogate or layout
            (channels, gamma, cell, domain).

    Source: TTC plan, "Process Reward Model (PRM)"; docs/design/decisions.md ("Triplets").
    """

    def __init__(self, manifest_paths: Place | Iterable[Place]) -> None:
        given = [manifest_paths] if isinstance(manifest_paths, (str, os.PathLike)) else list(manifest_paths)
        self.paths = [path for place in given for path in _sample_files(Path(place))]
        if not self.paths:
            raise DataError("manifest_paths is empty; give triplet files made by `ttcfast build_prm_data`, or a folder of them")
        self.parts = [TripletFile(path) if path.suffix.lower() in SUFFIXES else _TensorFile(path) for path in self.paths]
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))
        self._require_one_surrogate()
        first = next((part for part in self.parts if isinstance(part, TripletFile)), self.parts[0])
        self.shape = first.shape
        for part in self.parts:
            if isinstance(part, _TensorFile):
                part.expected = (self.shape, first.path)  # compared when it is read
            else:
                _require_shape(part.path, part.shape, self.shape, first.path)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Sample:
        return _four(self.frames([i])[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Returns a batch for ``DataLoader``, read at once; its samples share memory."""
        return list(map(_four, self.frames(indices)))

    def frames(self, indices: Sequence[int], *, first: int = 4) -> Tensor:
        """Reads samples ``[m, first, C, *S]`` into new memory: state, best, median, worst, and of triplet files also those after them."""
        places = [self.find(int(i)) for i in indices]
        parts = dict.fromkeys(part for part, _ in places)
        if len(parts) == 1:
            return places[0][0].frames([inner for _, inner in places], first=first)
        out = torch.empty(len(places), first, *self.shape)
        for part in parts:
            slots = [slot for slot, (own, _) in enumerate(places) if own is part]
            out[slots] = part.frames([places[slot][1] for slot in slots], first=first)
        return out

    def errors(self, i: int) -> Tensor:
        """Returns the errors ``[K]`` of all candidates of sample ``i``.

        Raises:
            DataError: The sample is from a ``.pt`` file, which stores none.
        """
        part, inner = self.find(i)
        if isinstance(part, _TensorFile):
            raise DataError(f"{part.path} holds three candidates and no errors; errors are stored by `ttcfast build_prm_data`")
        return torch.from_numpy(part.errors[inner])

    def find(self, i: int) -> tuple[TripletFile | _TensorFile, int]:
        """Returns the file of sample ``i`` and its index within that file."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        f = bisect.bisect_right(self._ends, i)
        return self.parts[f], i - (self._ends[f - 1] if f else 0)

    def _require_one_surrogate(self) -> None:
        made = [part for part in self.parts if isinstance(part, TripletFile)]
        for part in made[1:]:
            if part.surrogate != made[0].surrogate:
                raise DataError(
                    f"{part.path} was made with surrogate {part.surrogate[:12]} and {made[0].path} with {made[0].surrogate[:12]}: triplets "
                    "of two surrogates are not mixed; give files of one"
                )
            mine, theirs = (replace(file.units(), gamma=None) for file in (part, made[0]))
            require_units(mine, theirs, "give files of one time step and one cell")
            if found := spec_difference(part.spec, made[0].spec):
                name, one, wanted = found
                raise DataError(f"{part.path} was made with {name} {one} and {made[0].path} with {wanted}; give files of one")


class _TensorFile:
    """One sample in the plan's format; read and checked on access, since there may be many files."""

    def __init__(self, path: Path) -> None:
        self.path = require_regular(path, "triplet file", "make it again, or leave it out of manifest_paths")
        self.expected: tuple[tuple[int, ...], Path] | None = None

    def __len__(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(load_triplet_file(self.path)["best"].shape)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def frames(self, indices: Sequence[int], *, first: int = 4) -> Tensor:
        held = load_triplet_file(self.path)
        if self.expected is not None:
            _require_shape(self.path, tuple(held["best"].shape), *self.expected)
        return torch.stack([held[key].float() for key in TRIPLET_KEYS[:first]]).repeat(len(indices), *[1] * (1 + held["best"].ndim))


def _require_shape(path: Path, shape: tuple[int, ...], expected: tuple[int, ...], other: Path) -> None:
    if shape != expected:
        raise DataError(
            f"{path} holds states of shape {list(shape)} and {other} of {list(expected)}; give files of one shape [C, *S], made on one grid"
        )


def _sample_files(place: Path, named_by: Path | None = None) -> list[Path]:
    """The sample files that a path stands for."""
    told = "" if named_by is None else f" (named by {named_by})"
    if os.path.isdir(place):  # Path.is_dir raises for names that are too long
        if (place / FILE_NAME).is_file():
            return [place / FILE_NAME]
        files = entries(place, *SUFFIXES, ".pt")
        if not files:
            unfinished = next(place.glob("*.partial"), None)
            more = f" but the unfinished {unfinished.name}: run the command that makes it once more" if unfinished else ""
            raise DataError(f"folder {place}{told} holds no .hdf5 and no .pt file{more or '; make some with `ttcfast build_prm_data`'}")
        return files
    require_regular(place, "triplet file", "make it with `ttcfast build_prm_data`, or give another path", told=told)
    kind = place.suffix.lower()
    if kind == ".txt" and named_by is None:
        try:
            lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise DataError(f"triplet list {place} is no text ({error}); give a .txt that names one triplet file a line") from error
        return [path for line in lines if line for path in _sample_files(place.parent / line, place)]
    if kind == ".partial":
        raise DataError(f"triplet file {place}{told} is unfinished; run the command that makes it once more")
    if kind not in (*SUFFIXES, ".pt"):
        raise DataError(f"triplet file {place}{told} is of an unknown kind; give .hdf5, .pt, a folder, or a .txt that names such files")
    return [place]


def _four(frames: Tensor) -> Sample:
    return frames[0], frames[1], frames[2], frames[3]
