"""How the metrics read a trajectory: batched [N, T+1, C, *S], or one problem as [C, T+1, *S] (DECISIONS 10)."""

from __future__ import annotations

from torch import Tensor


def batched(name: str, trajectory: Tensor, ndim: int) -> tuple[Tensor, bool]:
    """The trajectory as ``[N, T+1, C, *S]``, and whether it was a single one.

    Raises:
        ValueError: the axes fit neither layout.
    """
    if trajectory.ndim == ndim + 3:
        return trajectory, False
    if trajectory.ndim == ndim + 2:
        return trajectory.transpose(0, 1).unsqueeze(0), True
    raise ValueError(
        f"{name} has shape {tuple(trajectory.shape)}; with {ndim} space axes a trajectory is [N, T+1, C, *S] or [C, T+1, *S] "
        "(give ndim= for data of another number of dimensions)"
    )


def matched(pred: Tensor, truth: Tensor, ndim: int) -> tuple[Tensor, Tensor, bool]:
    """Both as ``[N, T+1, C, *S]``, ``pred`` cut to the frames that the truth has.

    Raises:
        ValueError: axes, problems, channels or grid differ, or the truth is longer than the prediction.
    """
    p, single = batched("pred", pred, ndim)
    t, truth_single = batched("truth", truth, ndim)
    if single != truth_single or p.shape[0] != t.shape[0] or p.shape[2:] != t.shape[2:]:
        raise ValueError(f"pred has shape {tuple(pred.shape)} and truth {tuple(truth.shape)}; all but the time axis must agree")
    if p.shape[1] < t.shape[1]:
        raise ValueError(f"pred has {p.shape[1]} frames and truth {t.shape[1]}; cut the truth to the predicted frames")
    return p[:, : t.shape[1]], t, single
