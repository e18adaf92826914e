"""Opening trajectory files of any supported format: detection of the format, choice of files and of trajectories."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from ttcfast.checks import one_of, whole
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import entries

from .pdebench import PDEBenchFile
from .pdegym import PUBLISHED, ChunkOrder, Energy, PDEGymFile, chunk_files
from .picks import Picks
from .reader import TrajectoryReader, held, open_file
from .trajectory_file import SUFFIXES, TrajectoryFile, find_files
from .trajectory_set import TrajectorySet

Format = Literal["auto", "well", "pdegym", "pdebench"]
# Entries of the root group by which a format is recognised.
_MARKS = {"well": ("t0_fields", "t1_fields", "t2_fields"), "pdegym": ("data", "solution"), "pdebench": ("density",)}
# Fields of ReadOptions that apply to a format.
_OPTIONS = {
    "well": (),
    "pdegym": ("chunk_order", "split_counts", "periodic", "gamma", "energy"),
    "pdebench": ("split_counts", "periodic", "gamma"),
}
# Order of the splits in formats that keep them in one file.
_PLACES = {"pdegym": ("train", "valid", "test"), "pdebench": ("test", "valid", "train")}


@dataclass(frozen=True)
class ReadOptions:
    """Format of data files, and the options that a format leaves open.

    Args:
        format: ``"well"`` (The Well's layout, also ours), ``"pdegym"``, ``"pdebench"``, or ``"auto"``, which inspects the first file.
        chunk_order: PDEGym only. Order in which numbered chunks form the set: ``"numeric"`` (as in the papers) or ``"lexicographic"`` (as
            in the published script). It determines which trajectories are the test split.
        split_counts: PDEGym and PDEBench. Numbers of train, valid and test trajectories, which sum to the size of the set. None takes the
            published ones: 9640, 120 and 240 with the test split last (CE-RM: 1030, 100, 130); in PDEBench the first tenth is the test
            split and the rest trains.
        periodic: PDEGym and PDEBench. Whether the domain is periodic. None takes CE-* as periodic, CE-RM as open (its boundary is not
            documented), and PDEBench as its file name states.
        gamma: PDEGym and PDEBench, whose files do not store it. None takes 1.4 and 5/3.
        energy: PDEGym only. ``"stored"`` takes the fifth channel of CE-* as the total energy, ``"pressure"`` computes it from the pressure.
    """

    format: Format = "auto"
    chunk_order: ChunkOrder = "numeric"
    split_counts: tuple[int, ...] | None = None
    periodic: bool | None = None
    gamma: float | None = None
    energy: Energy = "stored"

    def __post_init__(self) -> None:
        one_of("format", self.format, ("auto", *_MARKS))
        one_of("chunk_order", self.chunk_order, ("numeric", "lexicographic"))
        one_of("energy", self.energy, ("stored", "pressure"))
        if self.gamma is not None and not self.gamma > 1:
            raise ValueError(f"gamma is {self.gamma}; it must be above 1")
        if self.split_counts is not None:
            object.__setattr__(self, "split_counts", tuple(self.split_counts))
            if len(self.split_counts) != 3:
                raise ValueError(f"split_counts is {list(self.split_counts)}; give three numbers, [train, valid, test]")
            for count in self.split_counts:
                whole("split_counts", count, 0)


def open_trajectories(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    format: Format = "auto",
    *,
    split: str | None = None,
    chunk_order: ChunkOrder = "numeric",
    split_counts: Sequence[int] | None = None,
    periodic: bool | None = None,
    gamma: float | None = None,
    energy: Energy = "stored",
) -> TrajectorySet:
    """Open trajectory files lazily; only their headers are read.

    Args:
        path: A file, a folder (of files, of ``data/<split>`` folders as written by ``ttcfast generate``, or of PDEGym chunks), or a
            sequence of them.
        format, chunk_order, split_counts, periodic, gamma, energy: As in ``ReadOptions``.
        split: For The Well's layout the folder of that name (a single file is read whole); for PDEGym and PDEBench that part of the set.
            None reads everything.

    Returns:
        The trajectories in the order of the files, in physical units and the files' own channels; ``.converted(spec)`` changes channels.

    Raises:
        ArgumentError: An option is unknown or does not apply to the format.
        DataError: A file or chunk is missing, damaged or of another format, split counts do not match, or files differ.
    """
    try:
        options = ReadOptions(format, chunk_order, None if split_counts is None else tuple(split_counts), periodic, gamma, energy)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    readers: list[TrajectoryReader] = []
    runs: list[tuple[int, int, int]] = []
    for place in [path] if isinstance(path, (str, os.PathLike)) else path:
        kind, files = _find(Path(place), options, split)
        opened = [_open(kind, file, options) for file in files]
        runs += [(len(readers) + f, first, count) for f, first, count in _pick(kind, opened, options, split)]
        readers += opened
    return TrajectorySet(readers, Picks(runs))


def _find(root: Path, options: ReadOptions, split: str | None) -> tuple[str, list[Path]]:
    """Return the format of ``root`` and its files in order."""
    kind: str = options.format
    if root.exists() and not root.is_dir():
        return (_detect(root) if kind == "auto" else kind), [root]
    if kind == "auto":
        here = entries(root, ".nc", *SUFFIXES)
        # Only The Well keeps splits in folders.
        kind = _detect(here[0]) if here else "well"
    if not root.is_dir():
        raise DataError(f"{root} does not exist; give a data file or a folder that holds some (`ttcfast generate out=...` makes one)")
    if kind == "pdegym":
        return kind, chunk_files(root, options.chunk_order)
    return kind, find_files(root, split if kind == "well" else None)


def _detect(path: Path) -> str:
    """Return the format that the root entries of a file indicate."""
    with open_file(path) as file:
        for kind, marks in _MARKS.items():
            if any(mark in file for mark in marks):
                return kind
        raise DataError(
            f"data file {path} holds {held(file)}; expected t0_fields and t1_fields (The Well), data or solution (PDEGym), or density, "
            "pressure, Vx (PDEBench)"
        )


def _open(kind: str, path: Path, options: ReadOptions) -> TrajectoryReader:
    set_by_user = {f.name for f in fields(options) if getattr(options, f.name) != f.default} - {"format"}
    if foreign := sorted(set_by_user - set(_OPTIONS[kind])):
        raise ArgumentError(
            f"{foreign[0]} is {getattr(options, foreign[0])!r}; {path} is of format {kind}, which leaves "
            f"{', '.join(_OPTIONS[kind]) or 'nothing'} open: leave it out"
        )
    given = {name: getattr(options, name) for name in set_by_user & {"periodic", "gamma"}}
    try:
        if kind == "well":
            return TrajectoryFile(path)
        return PDEGymFile(path, energy=options.energy, **given) if kind == "pdegym" else PDEBenchFile(path, **given)
    except DataError as error:
        other = kind
        with contextlib.suppress(DataError):
            other = _detect(path)
        hint = "" if other == kind else f"; it looks like format={other}"
        raise DataError(f"{error}{hint}") from error


def _pick(kind: str, files: Sequence[TrajectoryReader], options: ReadOptions, split: str | None) -> list[tuple[int, int, int]]:
    """Return runs (file, first trajectory, count) of the split: of PDEGym's chunks as one set, of each PDEBench file separately."""
    sets = [range(len(files))] if kind == "pdegym" else [range(f, f + 1) for f in range(len(files))]
    picked: list[tuple[int, int, int]] = []
    for members in sets:
        everything = Picks((f, 0, len(files[f])) for f in members)
        if split is None or kind == "well":
            picked += everything.runs
        else:
            first, tests = files[members[0]], int(0.1 * len(everything))
            published = PUBLISHED[first.variable] if isinstance(first, PDEGymFile) else (len(everything) - tests, 0, tests)
            counts = options.split_counts or published
            picked += everything.part(*_part(kind, split, counts, len(everything), first.path, len(members))).runs
    return picked


def _part(kind: str, split: str, counts: Sequence[int], total: int, path: Path, files: int) -> tuple[int, int]:
    """Return the first trajectory of a split and the one after its last."""
    names = ("train", "valid", "test")
    if split not in names:
        raise ArgumentError(f"split is {split!r}; {kind} data have {', '.join(names)}: give one of them, or null for all")
    sizes = dict(zip(names, counts, strict=True))
    said = " + ".join(f"{name} {size}" for name, size in sizes.items())
    if sum(counts) != total:
        raise DataError(
            f"{path}{f' and {files - 1} more' if files > 1 else ''}: {total} trajectories, but the splits are {said} = {sum(counts)}; give "
            f"split_counts=[train,valid,test] that add up to {total}, or split=null for all of them"
        )
    if not sizes[split]:
        raise DataError(f"{path}: split {split} holds no trajectory ({said}); give split_counts=[train,valid,test], or split=null for all")
    order = _PLACES[kind]
    before = sum(sizes[name] for name in order[: order.index(split)])
    return before, before + sizes[split]
