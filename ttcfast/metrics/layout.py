"""Normalises the two layouts of trajectories that metrics accept: ``[N, T+1, C, *S]``, or ``[C, T+1, *S]`` for one problem.

Source: docs/design/decisions.md ("Shapes of rollouts").
"""

from __future__ import annotations

from torch import Tensor


def batched(name: str, trajectory: Tensor, ndim: int) -> tuple[Tensor, bool]:
    """Returns the trajectory as ``[N, T+1, C, *S]``, and whether it was a single one.

    Raises:
        ValueError: The axes match neither layout.
    """
    if trajectory.ndim == ndim + 3:
        return trajectory, False
    if trajectory.ndim == ndim + 2:
        return trajectory.transpose(0, 1).unsqueeze(0), True
    raise ValueError(
        f"{name} has shape {tuple(trajectory.shape)}; with {ndim} space axes a trajectory is [N, T+1, C, *S] or [C, T+1, *S] "
        "(pass ndim= for data with another number of dimensions)"
    )


def matched(pred: Tensor, truth: Tensor, ndim: int) -> tuple[Tensor, Tensor, bool]:
    """Returns both as ``[N, T+1, C, *S]``, with ``pred`` cut to the length of the truth, and whether they were single trajectories.

    Raises:
        ValueError: Axes, problems, channels or grids differ, or the truth is longer than the prediction.
    """
    p, single = batched("pred", pred, ndim)
    t, truth_single = batched("truth", truth, ndim)
    if single != truth_single or p.shape[0] != t.shape[0] or p.shape[2:] != t.shape[2:]:
        raise ValueError(f"pred has shape {tuple(pred.shape)} and truth {tuple(truth.shape)}; all but the time axis must agree")
    if p.shape[1] < t.shape[1]:
        raise ValueError(f"pred has {p.shape[1]} frames and truth {t.shape[1]}; cut the truth to the predicted frames")
    return p[:, : t.shape[1]], t, single
