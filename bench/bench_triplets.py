"""Reading triplets in random order from a cached file: ``TripletFile.frames`` against alternative storage layouts.

A sample is a state and its best, median and worst candidate: four of the six frames that the file stores per sample. All peers read the
same 64 samples, drawn anew for every problem, in random order, from files in the system's page cache. ``bytes_moved`` counts bytes read
plus bytes written.

* ``h5py, chunk per sample``: one HDF5 chunk of six frames per sample, read by ``data[row, :4]``.
* ``h5py, contiguous``: our own file read through h5py.
* ``.pt per sample``: the plan's files, one ``torch.load(weights_only=True)`` per sample.
* ``numpy.memmap``: our own file mapped, each sample copied out; every page is read once per measurement, as in a training epoch.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ttcfast.core.normalizer import Normalizer
from ttcfast.spec import StateSpec

from . import timing
from .targets import Target
from .timing import Case

if TYPE_CHECKING:  # imported where files are made, since GPU machines that bench nothing here may not have h5py
    import h5py

    from ttcfast.rewards.prm.triplets.file import TripletFile

KEYS = ("state_t", "best", "med", "worst")
# name: (samples in the file, samples read at once, side)
CASES = {"64 samples 64^2": (512, 64, 64), "64 samples 32^2": (1024, 64, 32)}
PER_SECOND = 10_000  # issue 4, at 64^2 with one worker
TARGETS = (
    Target("64 samples 64^2", "", "p50_us", most=64 / PER_SECOND * 1e6),
    Target("64 samples 64^2", ".pt per sample", "ratio", least=2),
    Target("64 samples 64^2", "h5py, chunk per sample", "ratio", least=1.2),
)

Peer = Callable[["Problem"], Tensor]  # -> [64, 4, 4, side, side]


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    if device != "cpu":
        return
    for name, (count, at_once, side) in CASES.items():
        problem = Problem(12, 4, 6) if tiny else Problem(count, at_once, side)
        shape = f"[{problem.at_once}, 4, 4, {problem.side}, {problem.side}]"
        yield problem.case("triplets", name, shape, "float32", PEERS, bytes_moved=2 * problem.at_once * 4 * 4 * side * side * 4)


class Problem(timing.Problem):
    """Files of random samples, created on first use in a temporary folder and removed at exit."""

    device = "cpu"

    def __init__(self, count: int, at_once: int, side: int) -> None:
        self.count, self.at_once, self.side = count, at_once, side

    @cached_property
    def folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="ttcfast_triplets_"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def values(self) -> np.ndarray:
        from ttcfast.rewards.prm.triplets.file import FRAMES

        return np.random.default_rng(0).random((self.count, len(FRAMES), 4, self.side, self.side), dtype=np.float32)

    @cached_property
    def ours(self) -> TripletFile:
        from ttcfast.rewards.prm.triplets.file import TripletFile, TripletHeader
        from ttcfast.rewards.prm.triplets.writer import TripletWriter

        path, n = self.folder / "ours.hdf5", self.count
        header = TripletHeader(StateSpec.euler2d(), Normalizer(torch.zeros(4), torch.ones(4)), "00", {"K": 4})
        writer = TripletWriter(path, header, n, (4, self.side, self.side))
        zeros, picked = np.zeros(n, np.int64), np.tile([1, 2, 3], (n, 1))
        writer.append(
            frames=self.values, errors=np.zeros((n, 4)), picked=picked, step=zeros, trajectory=zeros, on_policy=np.zeros(n, np.bool_)
        )
        writer.complete()
        writer.close()
        return TripletFile(path)

    @cached_property
    def contiguous(self) -> h5py.Dataset:
        import h5py

        return h5py.File(self.ours.path)["frames"]

    @cached_property
    def chunked(self) -> h5py.Dataset:
        import h5py

        with h5py.File(self.folder / "chunked.hdf5", "w") as file:
            file.create_dataset("frames", data=self.values, chunks=(1, *self.values.shape[1:]))
        return h5py.File(self.folder / "chunked.hdf5")["frames"]

    @cached_property
    def tensors(self) -> list[Path]:
        paths = [self.folder / f"triplet_{i:08d}.pt" for i in range(self.count)]
        for path, value in zip(paths, self.values):
            torch.save(dict(zip(KEYS, torch.from_numpy(value[:4].copy()))), path)
        return paths

    @cached_property
    def out(self) -> Tensor:
        return torch.empty(self.at_once, 4, 4, self.side, self.side)

    @cached_property
    def order(self) -> Iterator[list[int]]:
        """Yield the rows to read, epoch after epoch."""

        def endless() -> Iterator[list[int]]:
            generator = torch.Generator().manual_seed(0)
            while True:
                yield from torch.randperm(self.count, generator=generator).split(self.at_once)

        return (part.tolist() for part in endless() if len(part) == self.at_once)

    def check(self, peers: dict[str, Peer]) -> None:
        picks = list(range(self.at_once))[::-1]
        for name, function in peers.items():
            self.order = iter([picks])
            if not np.array_equal(function(self).numpy(), self.values[picks][:, :4]):
                raise AssertionError(f"{name} reads wrong values")
        del self.order


def _ours(p: Problem) -> Tensor:
    return p.ours.frames(next(p.order), first=4, out=p.out)


def _by_rows(source: str, p: Problem) -> Tensor:
    held, out = getattr(p, source), p.out.numpy()
    for place, row in enumerate(next(p.order)):
        held.read_direct(out, np.s_[row, :4], np.s_[place])
    return p.out


def _tensors(p: Problem) -> Tensor:
    for place, i in enumerate(next(p.order)):
        held = torch.load(p.tensors[i], weights_only=True)
        for frame, key in enumerate(KEYS):
            p.out[place, frame] = held[key]
    return p.out


def _mapped(p: Problem) -> Tensor:
    data = p.contiguous
    pages = np.memmap(p.ours.path, np.float32, "r", data.id.get_offset(), data.shape)
    for place, row in enumerate(next(p.order)):
        p.out.numpy()[place] = pages[row, :4]
    return p.out


PEERS: dict[str, Peer] = {
    "ttcfast, TripletFile.frames": _ours,
    "h5py, chunk per sample": partial(_by_rows, "chunked"),
    "h5py, contiguous": partial(_by_rows, "contiguous"),
    ".pt per sample": _tensors,
    "numpy.memmap": _mapped,
}
