"""Problems with known truth, read from trajectory files."""

from __future__ import annotations

from collections.abc import Sequence

from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions, TrajectorySet
from ttcfast.models.on_grid import open_on_grid
from ttcfast.runtime.errors import DataError

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

    For a surrogate that sees h frames, frame 0 of a problem is the h-th frame of its trajectory, and steps count from there.

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
            channels, too few frames for its history, or another grid, time step or cell than the surrogate's.
    """
    found = open_on_grid(places, split, ReadOptions() if reading is None else reading, surrogate, checkpoint)
    source = found.first(count).converted(surrogate.spec)
    frames, first = source.stack(), surrogate.history - 1
    if frames.shape[1] < first + 2:
        raise DataError(
            f"the trajectories have {frames.shape[1]} frames and {checkpoint} has history={surrogate.history}; give trajectories of "
            f"{first + 2} frames or more, or a surrogate that sees fewer"
        )
    before, truth = (frames[:, :first] if first else None), frames[:, first:]
    scale = None if surrogate.normalizer is None else surrogate.normalizer.std.detach().float().cpu()
    kept = tuple(dict.fromkeys(i for i in shown if i < len(truth)))
    return Problems(truth, source.spec, steps, scale, kept, before), source
