"""Triplets as a map-style data set: our HDF5 files, and the sketch's one ``.pt`` file per sample."""

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

from .triplets.build import build_triplets
from .triplets.file import FILE_NAME, SUFFIXES, Place, TripletFile

__all__ = ["PRMTripletSet", "build_triplets"]

Sample = tuple[Tensor, Tensor, Tensor, Tensor]
KEYS = ("state_t", "best", "med", "worst")  # of a .pt file


class PRMTripletSet(Dataset[Sample]):
    """``(state, best, median, worst)``, each ``[C, *S]`` float32 in physical units.

    Read lazily: frames when asked for (where there are only ``.pt`` files the first at once, for the shape); each process (data-loader
    worker) opens the files by itself. A loop over one file reads fastest by ``TripletFile.frames(indices, first=4, out=...)``, without the
    copies of a ``DataLoader``'s collation and its workers' queue.

    Args:
        manifest_paths: a path or several, in this order: triplet files, ``.pt`` files of the sketch (a dict of the tensors ``state_t``,
            ``best``, ``med``, ``worst``), folders of either, or text files (``.txt``) that name one of these per line, relative to
            themselves. Triplet files and ``.pt`` files may be mixed here; ``train_prm`` wants one kind.

    Attributes:
        paths: the sample files, parts: their readers. shape: ``(C, *S)`` of every state.

    Raises:
        DataError: nothing given, a path that is missing, empty, damaged or holds something else, files whose states differ in shape, or
            triplets of different surrogates or layouts of the state (channels, gamma, cell, domain).

    Source: seeds/ttc-integration-plan.md section 5; DECISIONS, Test-time computing 11.
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
        part, inner = self._find(i)
        return _four(part.frames([inner], first=4)[0])

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """A batch for ``DataLoader``, read at once: neighbours in ``indices`` that are of one file share their memory."""
        samples: list[Sample] = []
        for part, picks in itertools.groupby((self._find(i) for i in indices), lambda found: found[0]):
            samples += map(_four, part.frames([inner for _, inner in picks], first=4))
        return samples

    def errors(self, i: int) -> Tensor:
        """Errors ``[K]`` of all candidates of sample ``i``.

        Raises:
            DataError: it is of a ``.pt`` file, which keeps none.
        """
        part, inner = self._find(i)
        if isinstance(part, _TensorFile):
            raise DataError(f"{part.path} holds three candidates and no errors; errors are kept by files of `ttcfast build_prm_data`")
        return torch.from_numpy(part.errors[inner])

    def _find(self, i: int) -> tuple[TripletFile | _TensorFile, int]:
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
    """One sample as the sketch saves it; read, and checked, when asked for, since there may be many."""

    def __init__(self, path: Path) -> None:
        self.path = require_regular(path, "triplet file", "make it again, or leave it out of manifest_paths")
        self.expected: tuple[tuple[int, ...], Path] | None = None

    def __len__(self) -> int:
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(_load(self.path)["best"].shape)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def frames(self, indices: Sequence[int], *, first: int = 4) -> Tensor:
        held = _load(self.path)
        if self.expected is not None:
            _require_shape(self.path, tuple(held["best"].shape), *self.expected)
        return torch.stack([held[key].float() for key in KEYS[:first]]).expand(len(indices), first, *held["best"].shape)


def _require_shape(path: Path, shape: tuple[int, ...], expected: tuple[int, ...], other: Path) -> None:
    if shape != expected:
        raise DataError(
            f"{path} holds states of shape {list(shape)} and {other} of {list(expected)}; give files of one shape [C, *S], made on one grid"
        )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch all have errors of their own for a file that is not theirs
        raise DataError(
            f"triplet file {path} is damaged, or holds something other than tensors, which is not opened ({type(error).__name__}); "
            f"expected a dict of the tensors {', '.join(KEYS)}"
        ) from error
    if not isinstance(held, dict) or any(not isinstance(held.get(key), Tensor) for key in KEYS):
        found = ", ".join(f"{k}: {type(v).__name__}" for k, v in held.items()) if isinstance(held, dict) else type(held).__name__
        raise DataError(f"triplet file {path} holds {found or 'nothing'}; expected a dict of the tensors {', '.join(KEYS)}")
    if foreign := sorted(str(key) for key, value in held.items() if not isinstance(value, Tensor)):
        raise DataError(f"triplet file {path} holds {', '.join(foreign)}, which are no tensors; expected {', '.join(KEYS)} alone")
    for key in KEYS:
        if held[key].is_complex() or held[key].nbytes > held[key].untyped_storage().nbytes():
            raise DataError(f"triplet file {path} holds {key} {list(held[key].shape)} of {held[key].dtype}, complex or without its values")
    shapes = {tuple(held[key].shape) for key in KEYS}
    if len(shapes) != 1:
        raise DataError(f"triplet file {path} holds states of shapes {', '.join(map(str, sorted(shapes)))}; expected one shape [C, *S]")
    return held


def _sample_files(place: Path, named_by: Path | None = None) -> list[Path]:
    """The files of samples that a path stands for."""
    told = "" if named_by is None else f" (named by {named_by})"
    if os.path.isdir(place):  # Path.is_dir raises for a name too long
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
