"""Draws the figures of ``bench.report``. Each holds a digest of its numbers, by which a figure that is not of today's rows is found."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")  # told apart by colour-blind readers, too
DIGEST = "Rows"  # the text of the PNG that holds it


@dataclass(frozen=True)
class Dots:
    """A value per operation and machine.

    Args:
        title, label: Of the figure, and of its axis of values.
        names: Of the operations, from top to bottom.
        series: Name, whether the dots are hollow, their colour's number and a value, or None, for every operation.
        line: A value that matters, where a line is drawn.
        log: Whether the axis is logarithmic.
        note: Said under the title.
    """

    title: str
    label: str
    names: tuple[str, ...]
    series: tuple[tuple[str, bool, int, tuple[float | None, ...]], ...]
    line: float
    log: bool
    note: str


@dataclass(frozen=True)
class Curves:
    """Milliseconds against a size, in panels: their axis, and by name abscissas and ordinates."""

    title: str
    panels: tuple[tuple[str, tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]], ...]


Drawing = Dots | Curves


def digest(data: Drawing) -> str:
    """Return what tells these numbers, and this way to draw them, from others."""
    return hashlib.sha256(repr(data).encode() + Path(__file__).read_bytes()).hexdigest()


def digest_of(path: Path) -> str | None:
    """Return the digest of the numbers of a figure; None if there is no figure."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        image.load()
        return image.info.get(DIGEST)


def draw(path: Path, data: Drawing) -> None:
    """Draw and save as PNG, on white, with its digest."""
    figure = _dots(data) if isinstance(data, Dots) else _curves(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, metadata={DIGEST: digest(data)})


def _dots(data: Dots) -> Figure:
    figure = Figure(figsize=(9, 1.9 + 0.23 * len(data.names)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, hollow, colour, values in data.series:
        kept = [(value, place) for place, value in enumerate(values) if value is not None]
        face = "white" if hollow else COLOURS[colour]
        axes.scatter(*zip(*kept), s=34, color=face, edgecolors=COLOURS[colour], linewidths=1.3, label=name, zorder=3)
    axes.axvline(data.line, color="#444444", linewidth=1.2, zorder=1)
    axes.set_yticks(range(len(data.names)), data.names, fontsize=9)
    axes.set_ylim(len(data.names) - 0.4, -0.6)
    axes.set_xlabel(data.label, fontsize=10)
    figure.suptitle("\n".join(filter(None, (data.title, data.note))), fontsize=11, x=0.01, ha="left")
    axes.grid(color="#dddddd", linewidth=0.7, zorder=0)
    figure.legend(fontsize=8.5, loc="outside lower center", ncols=2, frameon=False)
    if data.log:
        axes.set_xscale("log")
        _plain_ticks(axes, [0.3, 0.5, 1, 2, 3, 5, 10, 20, 50])
    else:
        axes.set_xlim(left=0)
    return figure


def _plain_ticks(axes: Axes, ticks: list[float]) -> None:
    low, high = axes.get_xlim()
    kept = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(kept, [f"{tick:g}" for tick in kept])
    axes.set_xticks([], minor=True)


def _curves(data: Curves) -> Figure:
    columns = 2
    rows = -(-len(data.panels) // columns)
    figure = Figure(figsize=(10, 0.5 + 3.3 * rows), layout="constrained", facecolor="white")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (label, lines) in zip(places, data.panels):
        colours: dict[str, str] = {}
        for name, xs, ys in lines:
            what, _, peer = name.partition(": ")
            colour = colours.setdefault(what, COLOURS[len(colours) % len(COLOURS)])
            place.plot(xs, ys, color=colour, linestyle="--" if peer else "-", marker="o", markersize=4, linewidth=1.6, label=name)
        place.set(xscale="log", yscale="log")
        place.set_xlabel(label, fontsize=10)
        place.set_ylabel("milliseconds", fontsize=10)
        place.grid(color="#dddddd", linewidth=0.7)
        place.legend(fontsize=8.5, framealpha=1)
        found = sorted({x for _, xs, _ in lines for x in xs})
        if len(found) < 3:  # a line to look at, no law to read off
            place.set(xscale="linear", yscale="linear", ylim=(0, None))
        if found[-1] <= 5000:
            place.set_xticks(found, [f"{x:g}" for x in found])
            place.set_xticks([], minor=True)
    for place in places[len(data.panels) :]:
        place.set_axis_off()
    figure.suptitle(data.title, fontsize=11, x=0.01, ha="left")
    return figure
