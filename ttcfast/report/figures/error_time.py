"""Error of every method against time."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ttcfast.evaluation.evaluate import Evaluation

from .style import GREY, finish, line_style, markers, method_legend, new_figure, step_axis, value_axis


def error_against_time(evaluation: Evaluation) -> Figure:
    """Mean squared error of each step, over all problems: as it is, and as a ratio to the deterministic rollout.

    A method that blew up is drawn as far as its mean is finite; the legend says how many problems it lost.
    """
    figure = new_figure(11.0, 4.4, f"Rollout error, mean over {evaluation.problems} problems")
    left, right = figure.subplots(1, 2)
    steps = torch.arange(1, evaluation.scored + 1)
    reference = _finite(evaluation.baseline.mse.mean(0)[1:])
    still = _finite(evaluation.persistence.mean(0)[1:])
    left.plot(steps, still, color=GREY, linestyle=":", linewidth=1.4)
    shown = [still]
    for order, result in enumerate(evaluation.results):
        error = _finite(result.mse.mean(0)[1:])
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
    method_legend(figure, evaluation.results, [persistence])
    return figure


def _finite(values: Tensor) -> Tensor:
    """Infinity and exact zeros as NaN, which matplotlib leaves out of a line instead of stretching the axis to it."""
    return values.double().masked_fill(~values.isfinite() | (values == 0), torch.nan)
