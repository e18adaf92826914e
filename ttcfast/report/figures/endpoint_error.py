"""Errors of imagined observations against the number of steps and the cost of training."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ttcfast.pwm.arms import Arm
from ttcfast.pwm.train_wm import Comparison
from ttcfast.report.world_models import by_arm

from .style import GREY, finish, new_figure, step_axis, value_axis

_COLOURS = {"mlp": "#000000", "residual": "#E69F00", "euler": "#56B4E9", "heun": "#D55E00"}  # as in style: Okabe and Ito
_MARKERS = {None: "o", 1: "v", 2: "s", 4: "D"}


def endpoint_error(comparison: Comparison) -> Figure:
    """Plot the observation error after each step (mean and range over random seeds) and, on the right, the last one against CPU time."""
    last = len(comparison.persistence.reward)
    figure = new_figure(11.0, 4.4, f"Imagined observations, {comparison.windows} held-out windows")
    left, right = figure.subplots(1, 2)
    steps = list(range(1, last + 1))
    still = list(comparison.persistence.observation)
    left.plot(steps, still, color=GREY, linestyle=":", linewidth=1.4)
    handles, shown = [Line2D([], [], label="nothing changes", color=GREY, linestyle=":", linewidth=1.4)], list(still)
    for order, (name, runs) in enumerate(by_arm(comparison).items()):
        style = arm_style(Arm(name))
        curves = [run.errors.observation for run in runs]
        mean = [fmean(values) for values in zip(*curves, strict=True)]
        left.plot(steps, mean, **style, markevery=(order % 3, 4), label=Arm(name).label)
        left.fill_between(steps, list(map(min, zip(*curves))), list(map(max, zip(*curves))), color=style["color"], alpha=0.12, linewidth=0)
        cost, ends = fmean(run.cpu_seconds for run in runs), [curve[-1] for curve in curves]
        right.plot([cost, cost], [min(ends), max(ends)], color=style["color"], linewidth=1.2)
        right.plot([cost], [mean[-1]], **{**style, "markersize": 7, "linestyle": ""}, label=Arm(name).label)
        handles.append(Line2D([], [], label=Arm(name).label, **style))
        shown += mean
    value_axis(left, shown)
    value_axis(right, [value for line in right.get_lines() for value in line.get_ydata().tolist()])
    step_axis(left, last)
    right.set_xlim(left=0)
    finish(left, "imagined steps", "error / variance of the observation")
    finish(right, "CPU seconds of training", f"the same after {last} steps")
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)
    return figure


def arm_style(arm: Arm) -> dict[str, Any]:
    """Return keyword arguments of ``Axes.plot`` for a kind of dynamics, the same in every figure."""
    return {
        "color": _COLOURS[arm.method or arm.kind],
        "linestyle": (0, (4, 2)) if arm.method == "euler" else "-",
        "linewidth": 1.5,
        "marker": _MARKERS.get(arm.substeps, "P"),
        "markersize": 4.5,
    }
