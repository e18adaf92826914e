"""Whether a higher score means a smaller error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.checks import at_least


@dataclass(frozen=True)
class Calibration:
    """Scores against realised errors, in bins of equal count from the lowest score to the highest.

    Attributes:
        count: pairs in each bin, int64 ``[bins]``.
        score: mean score of each bin, float64 ``[bins]``, ascending.
        error: mean error of each bin, float64 ``[bins]``; falls from left to right where the score is any good.
        rank_correlation: Spearman's rank correlation of score and error; -1: a perfect reward, 0: a useless one, NaN if either is constant.
        dropped: pairs left out because the score or the error was not finite.
    """

    count: Tensor
    score: Tensor
    error: Tensor
    rank_correlation: float
    dropped: int


def calibration(scores: Tensor, errors: Tensor, bins: int = 10) -> Calibration:
    """Bucket scores (higher is better) against the errors that the scored states turned out to have.

    Args:
        scores: any shape, for instance ``[N, T, B]``.
        errors: same shape, for instance the MSE of each candidate.
        bins: number of bins; fewer pairs than bins give one bin each.

    Raises:
        ValueError: shapes that differ, ``bins`` below 1, or no finite pair.

    Source: seeds/ttc-integration-plan.md section 13 ("bucket PRM scores vs realized MSE").
    """
    at_least("bins", bins, 1)
    s, e = torch.as_tensor(scores, dtype=torch.float64).flatten(), torch.as_tensor(errors, dtype=torch.float64).flatten()
    if torch.as_tensor(scores).shape != torch.as_tensor(errors).shape:
        raise ValueError(f"scores have shape {tuple(scores.shape)} and errors {tuple(errors.shape)}; give one error per score")
    usable = s.isfinite() & e.isfinite()
    if not bool(usable.any()):
        raise ValueError(f"none of the {s.numel()} pairs of score and error is finite; nothing to calibrate")
    dropped = int((~usable).sum())
    s, e = s[usable], e[usable]
    order = s.argsort(stable=True)
    parts = order.tensor_split(min(bins, s.numel()))
    return Calibration(
        count=torch.tensor([p.numel() for p in parts]),
        score=torch.stack([s[p].mean() for p in parts]),
        error=torch.stack([e[p].mean() for p in parts]),
        rank_correlation=_spearman(s, e),
        dropped=dropped,
    )


def _spearman(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of the ranks, tied values sharing their mean rank."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    _, group, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count.double() - 1) / 2)[group]
