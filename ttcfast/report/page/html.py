"""HTML generation that escapes every child and attribute unless this module made it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ttcfast.evaluation.table import MISSING

_VOID = {"img", "input", "meta", "br", "wbr"}
BRIEF = 12  # characters of a row's head below which its column needs no width of its own
MANY_COLUMNS, MOST_COLUMNS = 9, 15  # from the first on cells are tighter; more than the second do not fit a laptop's window


class Markup(str):
    """Text that is HTML already, made only by ``tag``, ``joined`` and ``trusted``."""

    __slots__ = ()


def trusted(text: str) -> Markup:
    """Mark HTML, CSS or JavaScript of the package as safe. Never use it for the contents of a run."""
    return Markup(text)


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """Return an element. ``class_`` is class, ``aria_label`` is aria-label; None and False omit an item, True has no value."""
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None and value is not False)
    written = "".join(f" {key}" if value is True else f' {key}="{html.escape(_plain(value))}"' for key, value in given)
    return Markup(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: Any) -> Markup:
    """Concatenate pieces: Markup unchanged, other values escaped, lists flattened, None omitted."""
    return Markup("".join(_child(child) for child in children))


def _child(child: Any) -> str:
    if child is None or child is False:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, (list, tuple)):
        return joined(*child)
    return html.escape(_plain(child))


def _plain(value: Any) -> str:
    """Return text that UTF-8 can encode; a lone surrogate in a file name would keep the page from being written."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Cell:
    """A table cell: its text, the number it is sorted by (None sorts by text), and whether it is the best of its column."""

    text: Any
    value: float | None = None
    best: bool = False


def number(value: Any, *, best: bool = False) -> Cell:
    """Return the cell of a number: three digits, sorted by the exact value; a dash for None and non-finite values."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return Cell(MISSING if value is None or isinstance(value, float) else value)
    return Cell(short(value), float(value), best)


def short(value: float) -> str:
    """Format to three digits: 0.00812, 1.19, 3.2e-07, 12,480."""
    if not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return (f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}").replace("-", "−", value < 0)


def table(
    caption: str,
    heads: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    *,
    text_columns: int = 1,
    keys: int = 1,
    most: int = MOST_COLUMNS,
    small: bool = False,
) -> Markup:
    """Return a table, which the script of the page makes sortable; one of too many columns comes in parts below each other.

    Args:
        caption: Caption, which screen readers announce, too.
        heads: Column heads.
        rows: Cells, as ``Cell`` or plain values.
        text_columns: Number of columns from the left that hold text and are aligned left; the first is the head of the row.
        keys: Number of columns from the left with which each part begins.
        most: Largest number of columns of a part.
        small: Use small print, for long lists such as provenance.
    """
    held, others = [list(row) for row in rows], len(heads) - keys
    parts = max(1, -(-others // max(1, most - keys)))
    made = []
    for part in range(parts):
        shown = [*range(keys), *range(keys + part * others // parts, keys + (part + 1) * others // parts)]
        place = f" ({part + 1} of {parts})" if parts > 1 else ""
        picked = [[row[i] for i in shown] for row in held]
        made.append(_part(caption + place, [heads[i] for i in shown], picked, sum(i < text_columns for i in shown), small))
    return joined(made)


def _part(caption: str, heads: Sequence[Any], rows: Sequence[Sequence[Any]], text_columns: int, small: bool) -> Markup:
    head = tag("tr", [tag("th", h, scope="col", class_="text" if i < text_columns else None) for i, h in enumerate(heads)])
    body = [tag("tr", [_cell(c, i, text_columns) for i, c in enumerate(row)]) for row in rows]
    brief = all(len(str(row[0].text if isinstance(row[0], Cell) else row[0])) <= BRIEF for row in rows)
    kind = " ".join(name for name, on in (("small", small), ("tight", len(heads) >= MANY_COLUMNS), ("brief", brief)) if on)
    inner = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", body), class_=kind or None)
    # Where it does not fit, as on a phone, a table scrolls by itself; focus lets the keyboard do it.
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(given: Any, column: int, text_columns: int) -> Markup:
    cell = given if isinstance(given, Cell) else Cell(MISSING if given is None else given)
    names = " ".join(name for name, on in (("text", column < text_columns), ("best", cell.best)) if on)
    value = None if cell.value is None else repr(float(cell.value))
    if column == 0:
        return tag("th", cell.text, scope="row", class_=names or None, data_value=value)
    return tag("td", _with_break(cell.text), class_=names or None, data_value=value)


def _with_break(text: Any) -> Any:
    """Return the text of a cell, which may be broken before an interval in brackets."""
    before, bracket, interval = text.partition(" [") if type(text) is str else ("", "", "")
    return joined(before, " ", tag("wbr"), "[", interval) if bracket else text


def facts(caption: str, pairs: Iterable[tuple[Any, Any]]) -> Markup:
    """Return names and values as a small table of two columns."""
    return table(caption, ("key", "value"), [(key, value) for key, value in pairs], text_columns=2, small=True)
