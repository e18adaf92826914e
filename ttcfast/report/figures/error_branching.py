"""Error against the branching factor."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ttcfast.evaluation.results import MethodResult
from ttcfast.evaluation.sweep import Sweep

from .style import branching_axis, colour, finish, line_style, method_legend, new_figure, value_axis


def error_against_branching(sweep: Sweep) -> Figure:
    """Rollout error against B as a ratio to the deterministic rollout: mean over problems, and in the background every problem.

    Left the average over all steps, right the last step alone; methods with projection in a row of their own.
    """
    forms = sorted({r.projected for r in sweep.results})
    title = f"Error against B, mean over {sweep.problems} problems (thin lines: single problems)"
    figure = new_figure(10.5, 1.0 + 3.2 * len(forms), title)
    grid = figure.subplots(len(forms), 2, sharex=True, squeeze=False)
    for projected, row in zip(forms, grid, strict=True):
        for axes, last_only in zip(row, (False, True), strict=True):
            _ratios(axes, sweep, projected, last_only)
    for axes, head in zip(grid[0], (f"mean of steps 1 to {sweep.scored}", f"step {sweep.scored}"), strict=True):
        axes.set_title(head, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("candidates per step B", fontsize=9)
    references = [r for r in sweep.references() if r.projected in forms]
    method_legend(figure, [*references, *sweep.results])
    return figure


def _ratios(axes: Axes, sweep: Sweep, projected: bool, last_only: bool) -> None:
    base = _error(sweep.deterministic, last_only)
    shown: list[float] = []
    for results in (line for line in sweep.lines() if line[0].projected == projected):
        factors = [r.branching_factor for r in results]
        errors = torch.stack([_error(r, last_only) for r in results])  # [B values, N]
        means = errors.mean(1) / base.mean()
        axes.plot(factors, errors / base, color=colour(results[0].method), linewidth=0.7, alpha=0.35)
        axes.plot(factors, means, **line_style(results[0]), label=results[0].name, zorder=3)
        shown += [*means.tolist(), *(errors / base).flatten().tolist()]
    for reference in sweep.references():
        ratio = float(_error(reference, last_only).mean() / base.mean())
        if reference.projected == projected:
            style = line_style(reference)
            axes.axhline(ratio, color=style["color"], linestyle=style["linestyle"], linewidth=1.2, label=reference.name)
            shown.append(ratio)
        elif not sweep.swept_projected:  # far below: a line there would flatten the others
            axes.text(0.02, 0.03, f"{reference.name}: {ratio:.2f}", transform=axes.transAxes, fontsize=8, ha="left", va="bottom")
    branching_axis(axes, sweep.branching_factors)
    value_axis(axes, shown)
    finish(axes, None, "MSE / MSE of the deterministic rollout" if not last_only else None)


def _error(result: MethodResult, last_only: bool) -> Tensor:
    """``[N]``, with infinity as NaN so that a blown-up problem leaves its line open."""
    error = result.mse[:, -1] if last_only else result.rollout_error
    return error.masked_fill(~error.isfinite(), torch.nan)
