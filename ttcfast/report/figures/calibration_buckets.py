"""Scores against the errors that the scored candidates turned out to have."""

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
    """One row per reward: left all candidates of all states together, right each state's candidates among themselves.

    The left asks whether a score tells easy states from hard ones; choosing rests on the right, where scores count by their rank within
    the group and errors as a ratio to the group's mean. A good reward falls from left to right.

    Args:
        scores: by reward, ``[M, B]``; not finite where a candidate was rejected.
        errors: mean squared error of the candidates, ``[M, B]``.
        bins: of equal count.

    Raises:
        ValueError: no reward, or shapes that differ.

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
    """The same as a table: a row per reward, form (``all`` or ``within``) and bin. Arguments and errors as ``calibration_figure``."""
    rows = []
    for name, given in scores.items():
        forms = {"all": calibration(given, errors, bins), "within": calibration(*_within(given, errors), min(bins, errors.shape[1]))}
        for form, found in forms.items():
            for i, (count, score, error) in enumerate(zip(found.count.tolist(), found.score.tolist(), found.error.tolist(), strict=True)):
                row = {"reward": name, "form": form, "bin": i, "count": count, "score": score, "error": error}
                rows.append({**row, "rank_correlation": found.rank_correlation, "dropped": found.dropped})
    return rows


def comparable(scores: Tensor, errors: Tensor) -> bool:
    """Whether any candidate of ``[M, B]`` has a finite score and an error that its group's mean gives a measure for."""
    return bool(torch.stack(_within(scores, errors)).isfinite().all(0).any())


def _within(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each score in its group, 0 to 1, ties at their mean rank, and error over the group's mean; NaN where not usable."""
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
