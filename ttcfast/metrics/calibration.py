"""Measures whether higher scores mean smaller errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.checks import at_least


@dataclass(frozen=True)
class Calibration:
    """Scores against true errors, in bins of equal count, from the lowest scores to the highest.

    Attributes:
        count: Pairs in each bin, int64 ``[bins]``.
        score: Mean score of each bin, float64 ``[bins]``, ascending.
        error: Mean error of each bin, float64 ``[bins]``; decreases for a useful score.
        rank_correlation: Spearman's rank correlation of score and error: -1 is perfect, 0 is useless, NaN if either is constant.
        dropped: Pairs left out because the score or the error is not finite.
    """

    count: Tensor
    score: Tensor
    error: Tensor
    rank_correlation: float
    dropped: int


def calibration(scores: Tensor, errors: Tensor, bins: int = 10) -> Calibration:
    """Bins scores (higher is better) against the errors of the scored states.

    Args:
        scores: Scores of any shape, such as ``[N, T, B]``.
        errors: Errors of the same shape, such as the MSE of each candidate.
        bins: Number of bins; fewer pairs than bins give one bin each.

    Raises:
        ValueError: Shapes differ, ``bins`` is below 1, or no pair is finite.

    Source: TTC plan, "Logging (e.g., W&B)".
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
    """Pearson's correlation of the ranks; tied values share their mean rank."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else float("nan")


def _ranks(x: Tensor) -> Tensor:
    _, group, count = torch.unique(x, return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0).double() - (count.double() - 1) / 2
    return ranks[group]
