"""Problems with known truth, read from trajectory files."""

from __future__ import annotations

from collections.abc import Sequence

from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions, TrajectorySet
from ttcfast.models.on_grid import open_on_grid

from .evaluate import Problems


def read_problems(
    surrogate: Surrogate,
    places: str | Sequence[str],
    steps: int,
    *,
    count: int | None = None,
    split: str | None = None,
    reading: ReadOptions | None = None,
    shown: Sequence[int] = (0,),
    checkpoint: str = "the model",
) -> tuple[Problems, TrajectorySet]:
    """Read initial conditions and their true trajectories, in the surrogate's channels and in units of its training data.

    Args:
        surrogate: The model to be evaluated.
        places: Trajectory files, or folders of them.
        steps: T, steps to roll out.
        count: Number of trajectories; None takes all.
        split: Split of the data; None takes all.
        reading: Format of the files, and what they leave open.
        shown: Problems whose trajectories are kept for figures; those that do not exist are left out.
        checkpoint: Name of the model in error messages.

    Returns:
        The problems, and the trajectories they were read from.

    Raises:
        DataError: A file that cannot be read, fewer trajectories than asked for, states that cannot be written in the surrogate's
            channels, or another grid, time step or cell than the surrogate's.
    """
    found = open_on_grid(places, split, ReadOptions() if reading is None else reading, surrogate, checkpoint)
    source = found.first(count).converted(surrogate.spec)
    truth = source.stack()
    scale = None if surrogate.normalizer is None else surrogate.normalizer.std.detach().float().cpu()
    kept = tuple(dict.fromkeys(i for i in shown if i < len(truth)))
    return Problems(truth, source.spec, steps, scale, kept), source
