"""Trajectories for a surrogate: opened, and checked to be on its grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions, TrajectorySet, open_trajectories
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.units import Units, require_units
from ttcfast.spec import StochasticConfig
from ttcfast.stochastic_sampling.directions import load_directions

from .checkpoint import units_of


def open_on_grid(
    places: str | Sequence[str], split: str | None, reading: ReadOptions, surrogate: Surrogate, checkpoint: str
) -> TrajectorySet:
    """The trajectories of a split, if they are on the grid that the surrogate takes, in cells and frames as far apart.

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
    require_fit(found, surrogate, checkpoint)
    return found


def units_of_data(found: TrajectorySet) -> Units:
    """Time step, cell volume and gamma of trajectories, named by their first file."""
    return Units.of_data(f"data file {found.files[0].path}", found.times, found.spec)


def require_fit(found: TrajectorySet, surrogate: Surrogate, checkpoint: str) -> None:
    """Raise ``DataError`` unless the trajectories have the surrogate's time step and cell volume, where both are known."""
    remedy = "give data of the same time step and cells, or a surrogate trained on these (ttcfast train_fm)"
    require_units(units_of_data(found), units_of(surrogate, checkpoint), remedy)


def require_directions_fit(found: TrajectorySet, stochastic: StochasticConfig | Mapping[str, Any] | None) -> None:
    """Raise ``DataError`` unless the directions along which candidates lie, if any, were learned at the data's time step and cells."""
    directions = StochasticConfig.of(stochastic).directions
    if directions is not None:
        remedy = "give directions learned on such data (ttcfast build_prm_data, fit_directions), or stochastic.directions=null"
        require_units(units_of_data(found), load_directions(directions).units, remedy)
