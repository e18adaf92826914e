"""Trajectories of one or more files as one lazily read sequence, in any channel layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.spec import EulerSpec, StateSpec

from .alike import agree, require_alike
from .convert import check_convertible, on_grid_of, same_channels, to_spec
from .picks import Picks
from .reader import TrajectoryReader

_MOST = 2**26  # trajectories that are indexed one by one


class TrajectorySet:
    """Trajectories from files that share grid, times and physics; gamma may differ between trajectories.

    Args:
        files: At least one.
        index: Pairs (file, trajectory); None takes all, file after file. Stored as ``Picks``.
        layout: Channels in which to read; None keeps those of the files. Its grid, gamma and boundary are ignored.

    Attributes:
        spec: Layout on the grid of the files; ``gamma`` is a number, or float64 ``[N]`` if it differs between the trajectories.
        times: ``[T+1]`` float64.
        shape: Cells per space dimension.
        files: The files, as given.
        scalars: Numbers that all files hold, such as a viscosity, by name: float64 ``[N]``, one per trajectory.

    Raises:
        DataError: No file, files that differ, or a ``layout`` to which they cannot be converted.
    """

    def __init__(
        self, files: Sequence[TrajectoryReader], index: Iterable[tuple[int, int]] | None = None, layout: StateSpec | None = None
    ) -> None:
        if not files:
            raise DataError("no data file given; name at least one file or a folder that holds some")
        require_alike(files, gamma=False)
        self.files = tuple(files)
        self.index = Picks((f, 0, len(file)) for f, file in enumerate(files)) if index is None else Picks.of(index)
        self.times, self.shape = files[0].times, files[0].shape
        self.layout = layout
        own = files[0].spec
        own = own.replace(gamma=self._gamma()) if isinstance(own, EulerSpec) else own
        self.spec = own if layout is None else self._checked(own, layout)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def scalars(self) -> dict[str, Tensor]:
        names = [name for name in self.files[0].scalars if all(name in file.scalars for file in self.files)]
        own = {name: [file.scalars[name].expand(len(file)) for file in self.files] for name in names}
        return {name: torch.cat([held[f][first : first + count] for f, first, count in self.index.runs]) for name, held in own.items()}

    def __getitem__(self, i: int) -> Tensor:
        """Return trajectory ``i``, ``[T+1, C, *S]`` float32."""
        return self.read(i)

    def read(self, i: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Read frames ``start:stop`` of trajectory ``i`` as ``[stop - start, C, *S]`` float32, physical units, channels of ``spec``."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"trajectory {i} of {len(self)}")
        f, trajectory = self.index[i]
        states = self.files[f].read(trajectory, start, stop)
        own = self.files[f].spec
        if self.layout is None or not isinstance(own, EulerSpec):
            return states if self.layout is None else to_spec(states, own, self.layout)
        return to_spec(states, own.replace(gamma=self._gamma_of(f, trajectory)), self.layout)

    def stack(self) -> Tensor:
        """Read all trajectories into memory, ``[N, T+1, C, *S]``."""
        return torch.stack([self[i] for i in range(len(self))])

    def subset(self, picks: Iterable[int]) -> TrajectorySet:
        """Return the trajectories at positions ``picks``, in that order."""
        return TrajectorySet(self.files, (self.index[i] for i in picks), self.layout)

    def first(self, count: int | None = None) -> TrajectorySet:
        """Return ``count`` trajectories in round-robin order over the files, so that few represent all; None reorders all.

        Raises:
            DataError: There are fewer, or ``count`` is below 1.
        """
        wanted = len(self) if count is None else count
        if wanted > len(self) or wanted < 1:
            raise DataError(
                f"{wanted} trajectories asked for, the {len(self.files)} data files hold {len(self)}; give a number from 1 to {len(self)}"
            )
        if len({f for f, _, _ in self.index.runs}) == 1:
            return TrajectorySet(self.files, self.index.part(0, wanted), self.layout)
        if wanted > _MOST:
            raise DataError(f"the data files declare {len(self)} trajectories; at most {_MOST} can be taken in turn: give a number of them")
        return self.subset(self.index.in_turn(range(wanted)))

    def spread(self, count: int) -> TrajectorySet:
        """Return at most ``count`` trajectories, evenly spaced in the order of ``first()``, so that every file is represented."""
        last = len(self) - 1
        # float32, as in earlier versions, as long as it tells neighbours apart.
        places = torch.linspace(0, last, min(count, len(self)), dtype=torch.float32 if last < 2**24 else torch.float64)
        return self.subset(self.index.in_turn(places.round().long().tolist()))

    def converted(self, layout: StateSpec) -> TrajectorySet:
        """Return the set read in the channels of ``layout``; the set itself if it is of a gas that has them already.

        Of other fields the layout also says what the files leave open (``on_grid_of``).
        """
        known = same_channels(self.spec, layout) and isinstance(layout, EulerSpec)
        return self if known else TrajectorySet(self.files, self.index, layout)

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

    def _gamma(self) -> float | Tensor | None:
        if not len(self.index):
            raise DataError(f"no trajectory in {', '.join(str(file.path) for file in self.files)}; give files that hold some")
        own = [file.spec.gamma for file in self.files]
        if None in own:
            return None
        gammas = [g.numpy() if torch.is_tensor(g) and g.ndim else np.float64(g) for g in own]
        runs = [gammas[f][first : first + count] if gammas[f].ndim else gammas[f] for f, first, count in self.index.runs]
        found = np.hstack(runs)  # one entry for a run that has one gamma
        if agree(found, found[0]):
            return float(found[0])
        if len(self) > _MOST:
            raise DataError(f"gamma differs between the {len(self)} trajectories declared; at most {_MOST} may: read fewer files")
        return torch.from_numpy(np.hstack([np.broadcast_to(g, count) for g, (_, _, count) in zip(runs, self.index.runs, strict=True)]))
