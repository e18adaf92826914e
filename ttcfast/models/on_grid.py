"""Opens trajectories for a surrogate and checks that they have its grid, time step and cells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions, TrajectorySet, open_trajectories
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.units import Units, require_units, time_step_of
from ttcfast.spec import EulerSpec, StateSpec, StochasticConfig
from ttcfast.stochastic_sampling.directions import load_directions

from .checkpoint import units_of
from .fno import FNO
from .vit import ViT


def open_on_grid(
    places: str | Sequence[str], split: str | None, reading: ReadOptions, surrogate: Surrogate, checkpoint: str
) -> TrajectorySet:
    """Open the trajectories of a split that have the surrogate's grid, cell volume and time step.

    Raises:
        DataError: They differ in one of these, or cannot be read.
    """
    found = open_trajectories(places, split=split, **dataclasses.asdict(reading))
    grid = getattr(getattr(surrogate.model, "config", None), "grid", None)
    if grid is not None and tuple(grid) != found.shape:
        raise DataError(
            f"data file {found.files[0].path} has {' x '.join(map(str, found.shape))} cells; the surrogate of {checkpoint} takes "
            f"{' x '.join(map(str, grid))}: give data on its grid, or a surrogate trained on this one"
        )
    require_fit(found, surrogate, checkpoint)
    if surrogate.origin is not None and surrogate.time_step is None:  # a factory's model, which knows no data
        surrogate.time_step = time_step_of(found.times)
    return found


def open_conserved(places: str | Sequence[str], split: str, reading: ReadOptions, spec: StateSpec | None = None) -> TrajectorySet:
    """Open the trajectories of a split in conserved variables.

    Args:
        spec: Layout that primitive variables are converted to, or whose fields are read; None for density, momentum and energy of a gas,
            and all fields of other physics.
    """
    found = open_trajectories(places, split=split, **dataclasses.asdict(reading))
    if not isinstance(found.spec, EulerSpec):
        return found if spec is None else found.converted(spec)
    if found.spec.variables == "conserved":
        return found
    gas = {1: StateSpec.euler1d, 2: StateSpec.euler2d, 3: StateSpec.euler3d}
    return found.converted(gas[found.spec.ndim]() if spec is None else spec)


def units_of_data(found: TrajectorySet) -> Units:
    """Return the time step, cell volume and gamma of trajectories, named by their first file."""
    return Units(f"data file {found.files[0].path}", time_step_of(found.times), found.spec.cell_volume, found.spec.gamma)


def require_fit(found: TrajectorySet, surrogate: Surrogate, checkpoint: str) -> None:
    """Raise ``DataError`` unless the trajectories have the surrogate's time step and cell volume, where both are known."""
    remedy = "give data of the same time step and cells, or a surrogate trained on these (ttcfast train_fm)"
    require_units(units_of_data(found), units_of(surrogate, checkpoint), remedy)


def require_directions_fit(found: TrajectorySet, stochastic: StochasticConfig | Mapping[str, Any]) -> None:
    """Raise ``DataError`` unless the directions along which candidates lie, if any, were learned at the data's time step and cells."""
    directions = StochasticConfig.of(stochastic).directions
    if directions is not None:
        remedy = "give directions learned on such data (ttcfast build_prm_data, fit_directions), or stochastic.directions=null"
        require_units(units_of_data(found), load_directions(directions).units, remedy)


def on_other_grid(surrogate: Surrogate, grid: Sequence[int]) -> Surrogate:
    """Return a surrogate with the same weights for another grid if the model, a ViT or FNO of ours, is made for one; else the same one.

    Raises:
        ValueError: The architecture does not fit the grid.
    """
    model = surrogate.model
    if not isinstance(model, (ViT, FNO)) or tuple(grid) == tuple(model.config.grid):
        return surrogate
    made = type(model)(dataclasses.replace(model.config, grid=tuple(grid)))  # type: ignore[arg-type]
    made.load_state_dict(model.state_dict())
    other = surrogate.variant()
    other.model = made.to(next(model.parameters())).eval()
    return other
