"""Line plots of training logs and ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from .style import branching_axis, colour, finish, new_figure, value_axis


@dataclass(frozen=True)
class Line:
    """A curve ``y`` over ``x`` in the colour of ``method``, dashed with projection; None in ``y`` is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    method: str | None = None
    projected: bool = False


def line_figure(
    title: str, lines: Sequence[Line], *, xlabel: str, ylabel: str, ticks: Sequence[float] | None = None, log: bool = False
) -> Figure:
    """Plot lines over one axis, with a legend if there are several.

    Args:
        title: Title of the figure.
        lines: What to draw.
        xlabel: Label of the x axis.
        ylabel: Label of the y axis.
        ticks: Ticks of the x axis; None picks round numbers.
        log: Whether the x axis is logarithmic, with ``ticks``.
    """
    named = len(lines) > 1
    figure = new_figure(7.2 if named else 5.2, 3.4, title)
    axes = figure.subplots()
    for line in lines:
        c = "#0060A8" if line.method is None else colour(line.method)
        y = np.array([np.nan if v is None else v for v in line.y], dtype=float)
        style: dict[str, Any] = {"linestyle": (0, (4, 2)) if line.projected else "-", "marker": "o" if len(y) <= 24 else None}
        axes.plot(line.x, np.where(np.isfinite(y), y, np.nan), color=c, linewidth=1.6, markersize=3.5, label=line.name, **style)
    value_axis(axes, [v for line in lines for v in line.y if v is not None])
    if log and ticks is not None:
        branching_axis(axes, ticks)
    elif ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    finish(axes, xlabel, ylabel)
    if named:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure
