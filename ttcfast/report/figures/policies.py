"""Policies trained inside world models: learning curves beside public returns, what explains them, and scores over all tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ttcfast.pwm.arms import Arm
from ttcfast.pwm.policy_result import Evaluation, PolicyResult
from ttcfast.report.policies import by_task_and_arm, mean, public_returns
from ttcfast.report.scores import THRESHOLDS, interquartile_mean, scores_of, shares_above, with_interval

from .endpoint_error import arm_style
from .style import GREY, finish, new_figure, step_axis, value_axis

_PUBLIC_MARKERS = {"TD-MPC2": "*", "DreamerV3": "^", "SAC": "s", "TD-MPC": "x", "PWM": "P"}
_COLUMNS = {"100000": (1.04, "100k"), "500000": (1.11, "500k"), "": (1.18, "offline")}  # beside the axes: position and name
_COLUMNS_SHOWN = 3
Value = Callable[[Evaluation], float]


def policy_figures(results: Sequence[PolicyResult]) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield name and maker of every figure that the finished runs allow."""
    if any(run.evaluations for run in results):
        yield "learning_curves", partial(learning_curves, results)
        yield "esnr", partial(curves, results, lambda e: e.esnr_db, "ESNR of the actor's gradient, raw", "dB")
        yield "gradient_cosine", partial(curves, results, lambda e: e.gradient_cosine, "Gradient against finite differences", "cosine")
        yield "values", partial(values, results)
    yield "endpoint_error", partial(observation_errors, results)
    if scores_of(results):
        yield "performance_profile", partial(performance_profile, results)


def learning_curves(results: Sequence[PolicyResult]) -> Figure:
    """Plot returns against updates, an axis per task, with what others have published for it on the right."""
    figure, axes = _panels(results, "Return: mean and range over random seeds")
    marks = {name for task, ax in axes.items() for name in _public(ax, task)}
    for task, ax in axes.items():
        _draw(ax, task, results, lambda e: e.mean)
        finish(ax, "updates of the policy", "return")
    if marks:
        figure.suptitle(f"{figure.get_suptitle()};\nbeside it published ones by environment steps", fontsize=10)
    shown = [Line2D([], [], label=name, **_mark(name)) for name in _PUBLIC_MARKERS if name in marks]
    _legend(figure, results, shown)
    return figure


def curves(results: Sequence[PolicyResult], value: Value, title: str, ylabel: str) -> Figure:
    """Plot a number of the evaluations against updates: mean and range over random seeds, an axis per task."""
    figure, axes = _panels(results, title)
    for task, ax in axes.items():
        _draw(ax, task, results, value)
        if ylabel == "cosine":
            ax.set_ylim(-1.05, 1.05)
        finish(ax, "updates of the policy", ylabel)
    _legend(figure, results)
    return figure


def values(results: Sequence[PolicyResult]) -> Figure:
    """Plot the predicted against the earned discounted value of every run, an axis per task; the dotted line is their equality."""
    figure, axes = _panels(results, "Discounted value of first states, last evaluation")
    for task, ax in axes.items():
        points = [0.0]
        for arm, runs in _arms(results, task):
            last = [run.evaluations[-1] for run in runs if run.evaluations]
            found = [(e.realised, e.predicted) for e in last if math.isfinite(e.realised + e.predicted)]
            ax.plot([x for x, _ in found], [y for _, y in found], **{**arm_style(Arm(arm)), "linestyle": ""})
            points += [v for pair in found for v in pair]
        ends = [min(points), max(points)]
        ax.plot(ends, ends, color=GREY, linestyle=":", linewidth=1.2)
        finish(ax, "earned", "predicted by the critic")
    _legend(figure, results)
    return figure


def observation_errors(results: Sequence[PolicyResult]) -> Figure:
    """Plot the observation error on held-out episodes against imagined steps, before (dotted) and after the policy's training."""
    figure, axes = _panels(results, "Imagined observations of held-out episodes")
    moved = any(run.errors != run.errors_before for run in results)
    for task, ax in axes.items():
        shown: list[float] = []
        for order, (arm, runs) in enumerate(_arms(results, task)):
            style = arm_style(Arm(arm))
            after = [mean(held) for held in zip(*(run.errors.observation for run in runs))]
            before = [mean(held) for held in zip(*(run.errors_before.observation for run in runs))]
            steps = range(1, len(after) + 1)
            ax.plot(steps, after, **style, markevery=(order % 3, 4))
            if moved:
                ax.plot(steps, before, color=style["color"], linestyle=":", linewidth=1.0)
            shown += after
        value_axis(ax, shown)
        step_axis(ax, max(len(run.errors.observation) for run in results if run.task == task))
        finish(ax, "imagined steps", "error / variance of the observation")
    before_the_policy = [Line2D([], [], label="before the policy", color=GREY, linestyle=":", linewidth=1.0)]
    _legend(figure, results, before_the_policy if moved else [])
    return figure


def performance_profile(results: Sequence[PolicyResult]) -> Figure:
    """Plot the interquartile mean of the scores over tasks and seeds, and the share of runs above every score.

    Bars and bands are 95 % intervals of the bootstrap stratified by task.
    """
    scores = scores_of(results)
    tasks = len(next(iter(scores.values())))
    figure = new_figure(10.0, 3.8, f"Scores (return / 1000), {tasks} task{'s' * (tasks != 1)}: interquartile mean and performance profile")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for place, (arm, held) in enumerate(scores.items()):
        style = arm_style(Arm(arm))
        middle, low, high = with_interval(held, interquartile_mean)
        left.plot([low, high], [place, place], color=style["color"], linewidth=2.2)
        left.plot([middle], [place], **{**style, "linestyle": "", "markersize": 7})
        above, below, over = with_interval(held, shares_above)
        right.plot(THRESHOLDS, above, color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
        right.fill_between(THRESHOLDS, below, over, color=style["color"], alpha=0.12, linewidth=0)
    left.set_yticks(range(len(scores)), [Arm(arm).label for arm in scores])
    left.set_ylim(len(scores) - 0.5, -0.5)
    finish(left, "interquartile mean of the score")
    finish(right, "score", "share of runs above it")
    _legend(figure, results)
    return figure


def _panels(results: Sequence[PolicyResult], title: str) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with an axis per task."""
    tasks = list(dict.fromkeys(run.task for run in results))
    columns = min(len(tasks), _COLUMNS_SHOWN)
    rows = -(-len(tasks) // columns)
    figure = new_figure(2.6 + 3.9 * columns, 0.5 + 3.2 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for ax in grid[len(tasks) :]:
        ax.remove()
    for task, ax in zip(tasks, grid):
        ax.set_title(task, fontsize=9)
    return figure, dict(zip(tasks, grid))


def _arms(results: Sequence[PolicyResult], task: str) -> list[tuple[str, list[PolicyResult]]]:
    return [(arm, runs) for (of, arm), runs in by_task_and_arm(results).items() if of == task]


def _draw(ax: Axes, task: str, results: Sequence[PolicyResult], value: Value) -> None:
    """Draw mean and range over random seeds at every number of updates."""
    for order, (arm, runs) in enumerate(_arms(results, task)):
        found: dict[int, list[float]] = {}
        for run in runs:
            for evaluation in run.evaluations:
                if math.isfinite(number := value(evaluation)):
                    found.setdefault(evaluation.step, []).append(number)
        steps, style = sorted(found), arm_style(Arm(arm))
        ax.plot(steps, [mean(found[step]) for step in steps], **style, markevery=(order % 2, 2) if len(steps) > 4 else None)
        low, high = [min(found[step]) for step in steps], [max(found[step]) for step in steps]
        ax.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _public(ax: Axes, task: str) -> set[str]:
    """Mark the public returns of ``task`` in columns beside the axis, and return whose they are."""
    beside, named = ax.get_yaxis_transform(), set()
    for row in public_returns():
        if row["task"] == task:
            place, name = _COLUMNS[row["environment_steps"]]
            ax.plot([place], [float(row["return"])], transform=beside, clip_on=False, **_mark(row["method"]))
            ax.text(place, -0.02, name, transform=ax.transAxes, fontsize=6, rotation=90, ha="center", va="top", color=GREY)
            named.add(row["method"])
    return named


def _mark(name: str) -> dict[str, Any]:
    return {"color": GREY, "linestyle": "", "marker": _PUBLIC_MARKERS[name], "markersize": 5, "markerfacecolor": "none"}


def _legend(figure: Figure, results: Sequence[PolicyResult], more: Sequence[Line2D] = ()) -> None:
    arms = dict.fromkeys(run.arm for run in results)
    handles = [Line2D([], [], label=Arm(arm).label, **arm_style(Arm(arm))) for arm in arms]
    figure.legend(handles=[*handles, *more], loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
