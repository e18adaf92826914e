"""Errors of the methods against time, branching factor and number of model evaluations."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.frontier import SEARCHES, Frontier
from ttcfast.evaluation.results import LABELS, MethodResult, bootstrap_interval
from ttcfast.evaluation.sweep import Sweep

from .style import (
    GREY,
    branching_axis,
    colour,
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

_STYLES = {  # colours of Okabe and Ito, as in style.py
    "greedy": ("#000000", "o", "greedy"),
    "lookahead": ("#E69F00", "v", "greedy, looking one step ahead"),
    "beam": ("#D55E00", "D", "beam"),
    "diverse_beam": ("#0072B2", "s", "diverse beam"),
    "particle": ("#009E73", "^", "particles"),
}


def error_against_time(evaluation: Evaluation) -> Figure:
    """Plot the mean squared error over all problems at each step, and its ratio to the deterministic rollout.

    A method that blew up is drawn as far as its mean is finite; the legend gives the number of problems lost.
    """
    figure = new_figure(11.0, 4.4, f"Rollout error, mean over {evaluation.problems} problems")
    left, right = figure.subplots(1, 2)
    steps = torch.arange(1, evaluation.scored + 1)
    reference = positive(evaluation.baseline.mse.mean(0)[1:])
    still = positive(evaluation.persistence.mean(0)[1:])
    left.plot(steps, still, color=GREY, linestyle=":", linewidth=1.4)
    shown = [still]
    for order, result in enumerate(evaluation.rollouts):
        error = positive(result.mse.mean(0)[1:])
        style = {**line_style(result), **markers(result.steps, order), "zorder": 4 if result.method == "deterministic" else 3}
        left.plot(steps[: result.steps], error, **style, label=result.name)
        right.plot(steps[: result.steps], error / reference[: result.steps], **style, label=result.name)
        shown.append(error)
    value_axis(left, torch.cat(shown).tolist())
    value_axis(right, [v for line in right.get_lines() for v in line.get_ydata().tolist()])
    for axes in (left, right):
        step_axis(axes, evaluation.scored)
    finish(left, "rollout step", "MSE (normalised units)")
    finish(right, "rollout step", "MSE / MSE of the deterministic rollout")
    persistence = Line2D([], [], color=GREY, linestyle=":", linewidth=1.4, label="persistence (copy of step 0)")
    method_legend(figure, evaluation.rollouts, [persistence])
    return figure


def error_against_seconds(evaluation: Evaluation) -> Figure:
    """Plot the rollout error against the seconds of one step of one problem, both logarithmic: every method measured in this
    run, and the solver at its grids.

    Bars are 95 % intervals over problems. Below and left of a point is a better error in less time.
    """
    figure = new_figure(9.0, 4.8, f"Error against time, {evaluation.problems} problems, {evaluation.scored} steps")
    axes = figure.subplots()
    timed = [r for r in evaluation.rollouts if r.seconds > 0 and r.recorded is None and math.isfinite(float(r.rollout_error.mean()))]
    solved = sorted((r for r in timed if r.method.startswith("solver ")), key=lambda r: r.seconds)
    work = evaluation.problems * evaluation.steps
    axes.plot([r.seconds / work for r in solved], [float(r.rollout_error.mean()) for r in solved], color=GREY, linewidth=1.2, zorder=1)
    for result in timed:
        mean, (low, high) = float(result.rollout_error.mean()), bootstrap_interval(result.rollout_error)
        ends = None if math.isnan(low) else [[mean - low], [high - mean]]
        style = {**line_style(result), "linestyle": "", "markersize": 6.0}
        axes.errorbar([result.seconds / work], [mean], yerr=ends, elinewidth=0.7, label=result.name, **style)
        if result in solved:
            axes.annotate(
                result.method.removeprefix("solver "), (result.seconds / work, mean), (5, 4), textcoords="offset points", fontsize=8
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    finish(axes, "seconds per problem and step", "MSE (normalised units)")
    axes.tick_params(which="minor", labelsize=8)
    method_legend(figure, timed)
    return figure


def error_against_branching(sweep: Sweep) -> Figure:
    """Plot the rollout error against B as a ratio to the deterministic rollout: the mean over problems and, thinner, every problem.

    The left column averages over all steps, the right column shows the last step; methods with projection have their own row.
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
            reference_line(axes, ratio, reference)
            shown.append(ratio)
        elif not any(r.projected for r in sweep.results):  # far below: a line there would flatten the others
            axes.text(0.02, 0.03, f"{reference.name}: {ratio:.2f}", transform=axes.transAxes, fontsize=8, ha="left", va="bottom")
    branching_axis(axes, sweep.branching_factors)
    value_axis(axes, shown)
    finish(axes, None, "MSE / MSE of the deterministic rollout" if not last_only else None)


def _error(result: MethodResult, last_only: bool) -> Tensor:
    """Return the errors ``[N]``, with infinities as NaN so that the line of a blown-up problem has a gap."""
    error = result.mse[:, -1] if last_only else result.rollout_error
    return error.masked_fill(~error.isfinite(), torch.nan)


def search_label(search: str) -> str:
    """Return the label of a search; unknown names are returned unchanged."""
    return _STYLES[search][2] if search in _STYLES else search


def error_against_evaluations(frontier: Frontier) -> Figure:
    """Plot the ratio of the rollout error to the deterministic rollout against model evaluations per step, with one panel per reward.

    Lines are means over problems, error bars are standard errors; 1 is the deterministic rollout, which takes one evaluation.
    """
    rewards = list(dict.fromkeys(reward for reward, _ in frontier.results))
    title = f"Error against model evaluations, {frontier.problems} problems, {frontier.steps} steps"
    figure = new_figure(1.8 + 4.2 * len(rewards), 4.2, title)
    for axes, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards):
        axes.set_title(LABELS.get(reward, reward), fontsize=10)
        _panel(axes, frontier, reward)
    searches = [s for s in SEARCHES if any(search == s for _, search in frontier.results)]
    handles = [Line2D([], [], color=_STYLES[s][0], marker=_STYLES[s][1], markersize=4.5, label=_STYLES[s][2]) for s in searches]
    handles.append(Line2D([], [], color=GREY, linestyle=":", label="deterministic"))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, frontier: Frontier, reward: str) -> None:
    base, shown, factors = frontier.deterministic.rollout_error, [1.0], {1}
    for (name, search), found in frontier.results.items():
        if name != reward:
            continue
        shade, marker, label = _STYLES[search]
        ratios = torch.stack([r.rollout_error for r in found]) / base.mean()  # [points, N]
        ratios = ratios.masked_fill(~ratios.isfinite(), torch.nan)
        differences = ratios - base / base.mean()  # problem by problem: how much harder one is than another is no error bar
        errors = differences.std(1) / differences.shape[1] ** 0.5 if differences.shape[1] > 1 else torch.zeros(len(found))
        counts = [frontier.per_step(r) for r in found]
        style: dict[str, Any] = {"color": shade, "marker": marker, "markersize": 4.5, "linewidth": 1.5, "label": label}
        axes.errorbar(counts, ratios.mean(1), yerr=errors, elinewidth=0.8, capsize=2, **style)
        shown += ratios.mean(1).tolist()
        factors |= {round(c) for c in counts} if search == "greedy" else set()
    axes.axhline(1.0, color=GREY, linestyle=":", linewidth=1.2)
    branching_axis(axes, sorted(factors))
    value_axis(axes, shown)
    finish(axes, "model evaluations per problem and step", "MSE / MSE of the deterministic rollout")
