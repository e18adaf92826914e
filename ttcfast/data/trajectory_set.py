"""Trajectories of one or more files as one sequence, read lazily, in the channels that the user of them wants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec

from .convert import check_convertible, on_grid_of, same_channels, to_spec
from .reader import TrajectoryReader


class TrajectorySet:
    """Trajectories picked from files that share grid, times and physics (gamma may differ from one to the next).

    Args:
        files: at least one.
        index: which trajectories, as (file, trajectory); None takes all, file after file.
        layout: channels to read them in; None keeps the files' own. Its grid, gamma and boundary are not looked at.

    Attributes:
        spec: layout on the files' grid; ``gamma`` a number, or float64 ``[N]`` where it differs between the trajectories picked.
        times: ``[T+1]`` float64. shape: space dimensions. files: as given.

    Raises:
        DataError: no file, files that differ, or a ``layout`` that the files cannot be converted to.
    """

    def __init__(
        self, files: Sequence[TrajectoryReader], index: Iterable[tuple[int, int]] | None = None, layout: StateSpec | None = None
    ) -> None:
        if not files:
            raise DataError("no data file given; name at least one file or a folder that holds some")
        require_alike(files, gamma=False)
        self.files = tuple(files)
        self.index = tuple(index) if index is not None else tuple((f, i) for f, file in enumerate(files) for i in range(len(file)))
        self.times, self.shape = files[0].times, files[0].shape
        self.layout = layout
        own = files[0].spec.replace(gamma=self._gamma())
        self.spec = own if layout is None else self._checked(own, layout)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Tensor:
        """Trajectory ``i``, ``[T+1, C, *S]`` float32."""
        return self.read(i)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Frames ``start:stop`` of trajectory ``i``: ``[stop - start, C, *S]`` float32, physical units, channels as ``spec`` says."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"trajectory {i} of {len(self)}")
        f, trajectory = self.index[i]
        states = self.files[f].read(trajectory, start, stop)
        if self.layout is None:
            return states
        return to_spec(states, self.files[f].spec.replace(gamma=self._gamma_of(f, trajectory)), self.layout)

    def stack(self) -> Tensor:
        """All of them, ``[N, T+1, C, *S]``, in memory."""
        return torch.stack([self[i] for i in range(len(self))])

    def subset(self, picks: Iterable[int]) -> TrajectorySet:
        """Some of them, in the order of ``picks``."""
        return TrajectorySet(self.files, [self.index[i] for i in picks], self.layout)

    def first(self, count: int | None = None) -> TrajectorySet:
        """``count`` of them, the first of each file, then the second of each: a few stand for all. None reorders all.

        Raises:
            DataError: there are fewer, or ``count`` is below 1.
        """
        wanted = len(self) if count is None else count
        if wanted > len(self) or wanted < 1:
            raise DataError(
                f"{wanted} trajectories asked for, the {len(self.files)} data files hold {len(self)}; give a number from 1 to {len(self)}"
            )
        place: dict[int, int] = {}  # how many of a file came before
        order = []
        for pick, (f, _) in enumerate(self.index):
            place[f] = place.get(f, -1) + 1
            order.append((place[f], pick))
        return self.subset(pick for _, pick in sorted(order)[:wanted])

    def spread(self, count: int) -> TrajectorySet:
        """At most ``count`` of them, evenly spaced in the order of ``first()``, so that every file has its share."""
        order = self.first()
        return order.subset(torch.linspace(0, len(order) - 1, min(count, len(order))).round().long().tolist())

    def converted(self, layout: StateSpec) -> TrajectorySet:
        """The same read in the channels of ``layout``; exactly itself where the files have them already."""
        return self if same_channels(self.spec, layout) else TrajectorySet(self.files, self.index, layout)

    def close(self) -> None:
        """Close the files; the next read opens them again."""
        for file in self.files:
            file.close()

    def _checked(self, own: StateSpec, layout: StateSpec) -> StateSpec:
        try:
            check_convertible(own, layout)
        except ValueError as error:
            raise DataError(f"data file {self.files[0].path} cannot be read in the channels asked for: {error}") from error
        return on_grid_of(layout, own)

    def _gamma_of(self, f: int, trajectory: int) -> float:
        gamma = self.files[f].spec.gamma
        return float(gamma[trajectory]) if torch.is_tensor(gamma) and gamma.ndim else float(gamma)

    def _gamma(self) -> float | Tensor:
        found = [self._gamma_of(f, i) for f, i in self.index]
        if not found:
            raise DataError(f"no trajectory in {', '.join(str(file.path) for file in self.files)}")
        return found[0] if len(set(found)) == 1 else torch.tensor(found, dtype=torch.float64)


def require_alike(files: Sequence[TrajectoryReader], *, gamma: bool = True) -> None:
    """Raise ``DataError`` unless all files have one grid, one set of times and one physics; the message names the first difference.

    ``gamma``: whether it must be one number, too.
    """
    first = files[0].physics()
    if gamma and isinstance(first["gamma"], list):
        raise DataError(f"data file {files[0].path} has a gamma per trajectory; what is asked for needs one for all")
    for other in files[1:]:
        for name, value in other.physics().items():
            if value != first.get(name) and (gamma or name != "gamma"):
                raise DataError(f"data file {other.path} has {name} {value}; {files[0].path} has {first.get(name)}: read them in two runs")
