"""Calibration of rewards: scores of candidates against their true errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ttcfast.evaluation.results import LABELS
from ttcfast.metrics import Calibration, calibration

from .style import GREY, colour, finish, new_figure, value_axis


def calibration_figure(scores: Mapping[str, Tensor], errors: Tensor, bins: int = 10) -> Figure:
    """Plot the mean error against the score, one row per reward: on the left over all candidates, on the right within each state.

    The left column shows whether scores tell easy states from hard ones. Choosing rests on the right column, which takes ranks of scores
    and ratios of errors to the mean within each state. The curve of a good reward falls.

    Args:
        scores: Scores ``[M, B]`` by reward; not finite for a rejected candidate.
        errors: ``[M, B]``, mean squared errors of the candidates.
        bins: Number of bins of equal count.

    Raises:
        ValueError: There is no reward, or shapes differ.

    Source: TTC plan, "Logging (e.g., W&B)".
    """
    if not scores:
        raise ValueError("scores is empty; give the scores of at least one reward")
    groups, width = errors.shape
    title = f"Calibration: scores against realised errors, {groups} states with {width} candidates each"
    figure = new_figure(10.5, 0.8 + 2.9 * len(scores), title)
    grid = figure.subplots(len(scores), 2, squeeze=False)
    for (name, given), (left, right) in zip(scores.items(), grid, strict=True):
        _curve(left, name, calibration(given, errors, bins))
        left.set_title(LABELS.get(name, name), fontsize=10, loc="left")
        finish(left, "mean score of the bin", "mean squared error")
        ranks, ratios = _within(given, errors)
        _curve(right, name, calibration(ranks, ratios, min(bins, width)))
        right.axhline(1, color=GREY, linestyle=":", linewidth=1.2)
        finish(right, "rank of the score in its group (0 lowest, 1 highest)", "error / mean error of the group")
    return figure


def calibration_rows(scores: Mapping[str, Tensor], errors: Tensor, bins: int = 10) -> list[dict[str, Any]]:
    """Return the points of ``calibration_figure`` as one row per reward, form (``all`` or ``within``) and bin."""
    rows = []
    for name, given in scores.items():
        forms = {"all": calibration(given, errors, bins), "within": calibration(*_within(given, errors), min(bins, errors.shape[1]))}
        for form, found in forms.items():
            for i, (count, score, error) in enumerate(zip(found.count.tolist(), found.score.tolist(), found.error.tolist(), strict=True)):
                row = {"reward": name, "form": form, "bin": i, "count": count, "score": score, "error": error}
                rows.append({**row, "rank_correlation": found.rank_correlation, "dropped": found.dropped})
    return rows


def comparable(scores: Tensor, errors: Tensor) -> bool:
    """Whether any candidate of ``[M, B]`` has a finite score and a finite error relative to the mean of its group."""
    return bool(torch.stack(_within(scores, errors)).isfinite().all(0).any())


def _within(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rank of each score in its group (0 to 1, mean rank for ties) and its error over the mean of the group; NaN if unusable."""
    usable = scores.isfinite() & errors.isfinite()
    s, e = scores.double(), errors.double()
    pairs = usable.unsqueeze(1) & usable.unsqueeze(2)
    below = ((s.unsqueeze(2) > s.unsqueeze(1)).double() + 0.5 * (s.unsqueeze(2) == s.unsqueeze(1)).double()) * pairs
    count = usable.sum(1, keepdim=True)
    rank = (below.sum(2) - 0.5) / (count - 1).clamp_min(1)
    mean = torch.where(usable, e, 0.0).sum(1, keepdim=True) / count.clamp_min(1)
    return torch.where(usable, rank, torch.nan), torch.where(usable, e / mean, torch.nan)


def _curve(axes: Axes, name: str, found: Calibration) -> None:
    axes.plot(found.score, found.error, color=colour(name), marker="o", markersize=4.5, linewidth=1.6)
    value_axis(axes, found.error.tolist())
    axes.set_title(f"rank correlation {found.rank_correlation:+.2f}", fontsize=8, loc="right")
