"""The section of a training run: its tables, and charts of its log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ttcfast.report.figures.lines import Line, line_figure

from .html import Cell, Markup, joined, number, table, tag
from .pictures import drawn
from .runs import Run

MOST_ROWS, MOST_COLUMNS, MOST_CURVES, MOST_POINTS = 200, 12, 12, 200


def training_section(run: Run) -> Markup:
    """Return every CSV table of the folder (of policies those per run), then one chart per number of the log."""
    tables = [_table(name, rows) for name, rows in run.tables.items() if rows and not (run.policies and name == "table.csv")]
    curves = _curves(run.log)
    charts = [
        drawn(line_figure(name, [Line(name, *_thinned(points))], xlabel="step", ylabel=name))
        for name, points in list(curves.items())[:MOST_CURVES]
    ]
    left = list(curves)[MOST_CURVES:]
    return joined(
        [tag("h3", "Tables") if tables else None, tables],
        joined(tag("h3", "Log"), tag("div", charts, class_="charts")) if charts else None,
        tag("p", f"Not drawn: {', '.join(left)}.", class_="note") if left else None,
    )


def _table(name: str, rows: Sequence[Mapping[str, str]]) -> Markup:
    heads = list(rows[0])
    cells = [[_cell(row.get(head, "")) for head in heads] for row in rows[:MOST_ROWS]]
    more = f", the first {MOST_ROWS} of {len(rows)} rows" if len(rows) > MOST_ROWS else ""
    texts = max(1, next((i for i, cell in enumerate(cells[0]) if cell.value is not None), len(heads)))
    keys = texts + (heads[texts : texts + 1] == ["seed"])  # which tell the rows apart
    return table(name + more, list(map(_breakable, heads)), cells, text_columns=texts, keys=keys, most=MOST_COLUMNS)


def _breakable(name: str) -> Markup:
    """Return the name of a column, which may be broken behind each underscore."""
    first, *rest = name.split("_")
    return joined(first, [joined("_", tag("wbr"), part) for part in rest])


def _cell(text: str) -> Cell:
    try:
        value = float(text)
    except ValueError:
        return Cell(text or None)
    return number(int(value) if value.is_integer() and abs(value) < 1e15 and "." not in text else value)


def _curves(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return the numbers of the log that appear at two steps or more."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        for key, value in entry.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                found.setdefault(key, []).append((float(entry["step"]), float(value)))
    return {key: points for key, points in found.items() if len({x for x, _ in points}) > 1}


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Thin to at most ``MOST_POINTS`` by means over equal stretches of the log."""
    stretch = -(-len(points) // MOST_POINTS)
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    xs, ys = ([sum(p[axis] for p in part) / len(part) for part in parts] for axis in (0, 1))
    return xs, ys
