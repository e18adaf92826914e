"""Drift of the conserved totals against time and branching factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.sweep import Sweep

from .style import (
    GREY,
    branching_axis,
    finish,
    line_style,
    markers,
    method_legend,
    new_figure,
    positive,
    reference_line,
    step_axis,
    value_axis,
)

Grid = dict[tuple[bool, str], Axes]


def drift_against_time(evaluation: Evaluation) -> Figure:
    """Plot the relative drift of every conserved total (mass, momentum and energy of a gas) at each step, averaged over problems.

    Methods with projection have their own row, since their drift is smaller by decades. The drift of the truth is drawn in grey.
    """
    results = evaluation.rollouts
    title = f"Conservation drift since step 0, mean over {evaluation.problems} problems"
    quantities = evaluation.quantities
    figure, grid = _grid(title, sorted({r.projected for r in results}), quantities, shared=True)
    lines: dict[bool, list[Tensor]] = {form: [] for form, _ in grid}
    for (projected, quantity), axes in grid.items():
        if projected or len(grid) == len(quantities):
            truth = positive(evaluation.truth_drift[quantity].mean(0)[1:])
            axes.plot(range(1, len(truth) + 1), truth, color=GREY, linestyle=":", linewidth=1.4, zorder=1)
            lines[projected].append(truth)
        for order, result in enumerate(r for r in results if r.projected == projected):
            if quantity not in result.drift:  # a row of another run
                continue
            drift = positive(result.drift[quantity].mean(0)[1:])
            axes.plot(range(1, len(drift) + 1), drift, **line_style(result), **markers(len(drift), order), label=result.name)
            lines[projected].append(drift)
        step_axis(axes, evaluation.steps)
    for form, drawn in lines.items():  # a row shares its axis
        value_axis(grid[form, quantities[0]], torch.cat(drawn).tolist())
    _outer_labels(grid, "rollout step", quantities[0])
    method_legend(figure, results, [Line2D([], [], color=GREY, linestyle=":", linewidth=1.4, label="truth (rounding of the data)")])
    return figure


def drift_against_branching(sweep: Sweep) -> Figure:
    """Plot the relative drift of the totals at the last step against B, averaged over problems.

    If projection was not swept, the titles give the drift of the deterministic rollout with projection.
    """
    title = f"Conservation drift at step {sweep.steps} against B, mean over {sweep.problems} problems"
    quantities = sweep.quantities
    figure, grid = _grid(title, sorted({r.projected for r in sweep.results}), quantities, shared=False)
    for (projected, quantity), axes in grid.items():
        shown: list[float] = []
        for results in (line for line in sweep.lines() if line[0].projected == projected):
            drift = positive(torch.tensor([r.final_drift(quantity) for r in results]))
            axes.plot([r.branching_factor for r in results], drift, **line_style(results[0]), label=results[0].name)
            shown += drift.tolist()
        for reference in sweep.references():
            value = reference.final_drift(quantity)
            if reference.projected == projected and value > 0:
                reference_line(axes, value, reference)
                shown.append(value)
        branching_axis(axes, sweep.branching_factors)
        value_axis(axes, shown)
        if sweep.projected is not None and (True, quantity) not in grid:
            axes.set_title(f"{quantity} (deterministic + projection: {sweep.projected.final_drift(quantity):.1e})", fontsize=9)
    _outer_labels(grid, "candidates per step B", quantities[0])
    references = [r for r in sweep.references() if (r.projected, quantities[0]) in grid]
    method_legend(figure, [*references, *sweep.results])
    return figure


def _grid(title: str, forms: Sequence[bool], quantities: Sequence[str], *, shared: bool) -> tuple[Figure, Grid]:
    """Make one row of axes per value of ``forms`` (without, with projection) and one column per quantity; ``shared`` shares y by row."""
    figure = new_figure(max(7.5, 12.5 * len(quantities) / 3), 1.0 + 3.1 * len(forms), title)
    axes = figure.subplots(len(forms), len(quantities), sharex=True, sharey="row" if shared else False, squeeze=False)
    for column, quantity in zip(axes[0], quantities, strict=True):
        column.set_title(quantity, fontsize=10)
    return figure, {(form, q): axes[i, j] for i, form in enumerate(forms) for j, q in enumerate(quantities)}


def _outer_labels(grid: Grid, xlabel: str, first: str) -> None:
    last = max(form for form, _ in grid)
    for (form, quantity), axes in grid.items():
        kind = "with projection" if form else "without projection"
        finish(axes, xlabel if form == last else None, f"relative drift, {kind}" if quantity == first else None)
