"""Histogram of SampleGain over the problems."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.results import LABELS, Gain, MethodResult

from .style import GREY, colour, finish, new_figure

LOWEST = -100.0
"""Lowest gain drawn, in percent. Worse ones (twice the error, or blown up) are counted in the leftmost bin, labelled "or worse"."""


def gain_histogram(evaluation: Evaluation) -> Figure:
    """Plot the SampleGain of every problem, one row per method.

    The left column compares with the deterministic rollout; the right column compares methods with projection with the projected
    deterministic rollout, so that the gain of projection alone is not credited to the method.
    """
    columns = [reference for reference in (evaluation.baseline, evaluation.projected_baseline) if reference is not None]
    methods = list(dict.fromkeys(r.method for r in evaluation.rollouts if r.method != "deterministic"))
    size = (2.0 + 4.2 * len(columns), 1.3 + 1.05 * max(len(methods), 1))
    figure = new_figure(*size, f"SampleGain of {evaluation.problems} problems (right of 0: better than the reference)")
    if not methods:
        figure.text(0.5, 0.5, "only the deterministic rollout was evaluated", ha="center", va="center")
        return figure
    grid = figure.subplots(len(methods), len(columns), sharex="col", sharey=True, squeeze=False)
    for j, reference in enumerate(columns):
        gains = {m: _gains(evaluation.find(m, projected=reference.projected), reference) for m in methods}
        bins = _bins(np.concatenate(list(gains.values())))
        for axes, method in zip(grid[:, j], methods, strict=True):
            _histogram(axes, method, gains[method], bins, hatched=reference.projected)
        grid[-1, j].set_xlabel(f"gain over {reference.name} (%)", fontsize=9)
        if bins[0] == LOWEST:
            grid[-1, j].annotate("or worse", (LOWEST, 0), xytext=(0, -18), textcoords="offset points", fontsize=7, ha="left", va="top")
    figure.supylabel("problems", fontsize=9)
    median = Line2D([], [], color=GREY, marker="v", markersize=7, linestyle="", label="median")
    figure.legend(handles=[median], loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _gains(result: MethodResult | None, reference: MethodResult) -> np.ndarray:
    """Return gains per problem in percent; a problem on which both blew up counts as the worst."""
    return np.zeros(0) if result is None else np.nan_to_num(Gain.of(result, reference).per_problem.numpy(), nan=-np.inf, neginf=-np.inf)


def _histogram(axes: Axes, method: str, gains: np.ndarray, bins: np.ndarray, *, hatched: bool) -> None:
    c = colour(method)
    no_better = np.minimum(gains, -1e-9)  # a gain of exactly 0 is none: it belongs left of the line
    shown = np.clip(np.where(gains > 0, gains, no_better), bins[0], None)
    style: dict[str, Any] = {"facecolor": "white", "hatch": "////", "edgecolor": c} if hatched else {"facecolor": c, "edgecolor": "white"}
    axes.hist(shown, bins=bins.tolist(), linewidth=0.8, label=LABELS.get(method, method), **style)
    axes.axvline(0, color="black", linewidth=0.9)
    if len(shown):
        above = axes.get_xaxis_transform()
        axes.plot([np.median(shown)], [1.0], "v", transform=above, color=c, markersize=7, markeredgecolor="white", clip_on=False, zorder=5)
    axes.set_title(LABELS.get(method, method) + (" + projection" if hatched else ""), fontsize=9, loc="left", pad=6)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    finish(axes)


def _bins(values: np.ndarray) -> np.ndarray:
    """Return the edges of about 24 bins of round width that cover all values from ``LOWEST`` up, with an edge at 0."""
    low = min(max(float(values.min(initial=0.0)), LOWEST), 0.0)
    high = max(float(values.max(initial=0.0)), 0.0)
    widths = [m * 10.0**e for e in range(-3, 2) for m in (1, 2, 5)]
    width = next(w for w in widths if high - low <= 22 * w or w == widths[-1])
    first = LOWEST if low == LOWEST else width * (np.floor(low / width) - 1)
    count = round((width * (np.ceil(high / width) + 1) - first) / width)
    return first + width * np.arange(count + 1)
