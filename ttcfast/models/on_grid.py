"""Trajectories for a surrogate: opened, and checked to be on its grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions, TrajectorySet, open_trajectories
from ttcfast.runtime.errors import DataError


def open_on_grid(
    places: str | Sequence[str], split: str | None, reading: ReadOptions, surrogate: Surrogate, checkpoint: str
) -> TrajectorySet:
    """The trajectories of a split, if they are on the grid that the surrogate takes.

    Raises:
        DataError: they are not, or cannot be read.
    """
    found = open_trajectories(places, split=split, **dataclasses.asdict(reading))
    grid = getattr(getattr(surrogate.model, "config", None), "grid", None)
    if grid is not None and tuple(grid) != found.shape:
        raise DataError(
            f"data file {found.files[0].path} has {' x '.join(map(str, found.shape))} cells; the surrogate of {checkpoint} takes "
            f"{' x '.join(map(str, grid))}: give data on its grid, or a surrogate trained on this one"
        )
    return found
