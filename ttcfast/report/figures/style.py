"""Shared style of the figures: one colour and marker per method, dashed lines with projection, axes, legends and saving."""

from __future__ import annotations

import colorsys
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, NullFormatter, ScalarFormatter
from torch import Tensor

from ttcfast.evaluation.results import LABELS, MethodResult
from ttcfast.runtime.files import atomic_write

# Okabe and Ito, "Color universal design" (2008): eight colours that readers with any colour vision tell apart.
_LOOKS = {  # colour and marker
    "deterministic": ("#000000", "o"),
    "random": ("#E69F00", "v"),
    "mean": ("#56B4E9", "s"),
    "arm": ("#D55E00", "D"),
    "oracle": ("#009E73", "^"),
    "prm": ("#CC79A7", "P"),
    "finetuned": ("#0072B2", "X"),
    "arm_prm": ("#882255", "p"),
    "prm_refined": ("#999933", "*"),
    "span_oracle": ("#44AA99", "h"),
}
_SPARE = ("#F0E442", "#AA4499", "#332288", "#DDCC77")
_VARIANTS = [method for method in LABELS if method not in _LOOKS]  # other uses of a reward: seldom more than two or three in one figure
GREY = "#7F7F7F"


def colour(method: str) -> str:
    """Return the colour of a method, the same in every figure; unknown names get a fixed spare colour."""
    if method in _VARIANTS:  # golden-ratio steps around the circle: neighbours in the list are far apart
        i = _VARIANTS.index(method)
        return to_hex(colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.35 * (i % 2), 0.8 - 0.25 * (i % 3 == 0)))
    return _LOOKS[method][0] if method in _LOOKS else _SPARE[sum(map(ord, method)) % len(_SPARE)]


def line_style(result: MethodResult) -> dict[str, Any]:
    """Return keyword arguments of ``Axes.plot`` for a method; lines with projection are dashed, their markers hollow."""
    c = colour(result.method)
    return {
        "color": c,
        "linestyle": (0, (4, 2)) if result.projected else "-",
        "linewidth": 1.6,
        "marker": _LOOKS.get(result.method, ("", "h"))[1],
        "markersize": 4.5,
        "markerfacecolor": "white" if result.projected else c,
        "markeredgecolor": c,
        "markeredgewidth": 1.1,
    }


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches whose layout reserves space for legends outside the axes."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11, x=0.01, horizontalalignment="left")  # a centred one runs into a legend on the right
    return figure


def finish(axes: Axes, xlabel: str | None = None, ylabel: str | None = None) -> None:
    """Add labels and a light grid behind the data, and hide the top and right spines."""
    if xlabel:
        axes.set_xlabel(xlabel, fontsize=9)
    if ylabel:
        axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def step_axis(axes: Axes, steps: int) -> None:
    """Set the x axis to steps 1 to ``steps``, with ticks at 1 and at round numbers."""
    axes.set_xlim(1 - 0.02 * steps, steps * 1.02)
    gap = next((g for g in (1, 2, 5, 10, 20, 50, 100, 200, 500) if steps <= 6 * g), max(1, steps // 5))
    axes.xaxis.set_major_locator(FixedLocator([1.0, *(float(t) for t in range(gap, steps + 1, gap) if t > 1)]))


def markers(points: int, order: int) -> dict[str, Any]:
    """Place about six markers per line, staggered by ``order`` so that coinciding curves remain visible."""
    gap = max(1, points // 6)
    return {"markevery": (order % gap, gap)}


def branching_axis(axes: Axes, factors: Sequence[float]) -> None:
    """Make the x axis logarithmic, with a tick at each of ``factors``."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(b) for b in factors]))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(FixedLocator([]))


def value_axis(axes: Axes, values: Iterable[float]) -> None:
    """Make the y axis logarithmic if the positive ``values`` span more than a decade."""
    positive = [v for v in values if 0 < v < float("inf")]
    if positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatterSciNotation())
        if max(positive) > 100 * min(positive):
            axes.yaxis.set_minor_formatter(NullFormatter())
    elif positive and max(positive) < 1e-2:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def reference_line(axes: Axes, value: float, result: MethodResult) -> None:
    """Draw the value of a method that does not depend on the x axis."""
    style = line_style(result)
    axes.axhline(value, color=style["color"], linestyle=style["linestyle"], linewidth=1.2, label=result.name, zorder=1)


def positive(values: Tensor) -> Tensor:
    """Replace zeros and non-finite values by NaN, which a logarithmic axis leaves out."""
    v = values.double()
    return v.masked_fill(~(v.isfinite() & (v > 0)), torch.nan)


def method_legend(figure: Figure, results: Sequence[MethodResult], extra: Sequence[Line2D] = ()) -> None:
    """Add a legend to the right of all axes, with one entry per method and one for the dashes of projection."""
    handles = []
    for method in dict.fromkeys(r.method for r in results):
        shown = next((r for r in results if r.method == method and not r.projected), None)
        style = line_style(shown or next(r for r in results if r.method == method))
        lost = max((int(r.blown_up.sum()), len(r.blown_up)) for r in results if r.method == method)
        note = f"\n({lost[0]}/{lost[1]} blew up)" if lost[0] else ""  # so that a curve that stops is not read as a good one
        handles.append(Line2D([], [], label=LABELS.get(method, method) + note, **style))
    if any(r.projected for r in results):
        dashed: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 2)), "marker": "o", "markerfacecolor": "white"}
        handles.append(Line2D([], [], label="dashed: with projection", markersize=4.5, **dashed))
    figure.legend(handles=[*handles, *extra], loc="outside right upper", fontsize=8, frameon=False, handlelength=3.2)


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG and, unless it contains images, as SVG beside it. Each file is written atomically.

    The title is stored in the metadata of both files.

    Raises:
        OutputError: The folder cannot be written or the disk is full.
    """
    picture = io.BytesIO()  # Pillow's own error on a full disk has neither number nor text
    figure.savefig(picture, format="png", dpi=dpi, metadata={"Title": figure.get_suptitle()})
    with atomic_write(path, "wb") as file:
        file.write(picture.getbuffer())
    figure.set_layout_engine(None)  # the SVG has the places found for the PNG: finding them is more than half of the work
    if any(axes.images for axes in figure.axes):
        remove(Path(path).with_suffix(".svg"))
        return
    with atomic_write(Path(path).with_suffix(".svg"), "wb") as file:
        file.write(svg_of(figure))


def remove(path: Path) -> None:
    """Remove the figure at ``path`` in both formats, if an earlier run left one."""
    for suffix in (path.suffix, ".svg"):
        path.with_suffix(suffix).unlink(missing_ok=True)


def svg_of(figure: Figure) -> bytes:
    """Render a figure as SVG, reproducibly and with text kept as text."""
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "ttcfast", "svg.fonttype": "none"}):
        figure.savefig(picture, format="svg", metadata={"Title": figure.get_suptitle(), "Date": None})
    return picture.getvalue()
