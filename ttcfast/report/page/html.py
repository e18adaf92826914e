"""HTML written so that nothing can slip in: every child and attribute is escaped unless this module made it."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ttcfast.evaluation.table import MISSING

_VOID = {"img", "input", "meta", "br"}


class Markup(str):
    """Text that is HTML already. Only ``tag``, ``joined`` and ``trusted`` make it."""

    __slots__ = ()


def trusted(text: str) -> Markup:
    """HTML, CSS or JavaScript of our own. Never for what comes from a file."""
    return Markup(text)


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. ``class_`` is class, ``aria_label`` is aria-label; None and False leave an attribute or child out, True has no value."""
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None and value is not False)
    written = "".join(f" {key}" if value is True else f' {key}="{html.escape(_plain(value))}"' for key, value in given)
    return Markup(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{joined(*children)}</{name}>")


def joined(*children: Any) -> Markup:
    """Several pieces in a row: Markup as it is, everything else escaped, lists opened, None left out."""
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
    """As text that UTF-8 can hold: a lone surrogate (of a file name) would stop the whole page from being written."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Cell:
    """A table cell: what it shows, the number it is sorted by (None: by its text), and whether it is the best of its column."""

    text: Any
    value: float | None = None
    best: bool = False


def number(value: Any, *, best: bool = False) -> Cell:
    """A number to three digits, sorted by its whole value; None and what is not finite as a dash."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return Cell(MISSING if value is None or isinstance(value, float) else value)
    return Cell(short(value), float(value), best)


def short(value: float) -> str:
    """Three digits: 0.00812, 1.19, 3.2e-07, 12,480."""
    if not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return (f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}").replace("-", "−", value < 0)


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, text_columns: int = 1, small: bool = False) -> Markup:
    """A table that the page's script makes sortable.

    Args:
        caption: what it holds; also its name for screen readers.
        heads: one per column. rows: cells, ``Cell`` or plain values.
        text_columns: so many from the left are text, aligned left; the first is the row's head.
        small: for provenance and other long lists.
    """
    head = tag("tr", [tag("th", h, scope="col", class_="text" if i < text_columns else None) for i, h in enumerate(heads)])
    body = [tag("tr", [_cell(c, i, text_columns) for i, c in enumerate(row)]) for row in rows]
    inner = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", body), class_="small" if small else None)
    # A wide table scrolls by itself; focus lets the keyboard do it.
    return tag("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(given: Any, column: int, text_columns: int) -> Markup:
    cell = given if isinstance(given, Cell) else Cell(MISSING if given is None else given)
    names = " ".join(name for name, on in (("text", column < text_columns), ("best", cell.best)) if on)
    value = None if cell.value is None else repr(float(cell.value))
    if column == 0:
        return tag("th", cell.text, scope="row", class_=names or None, data_value=value)
    return tag("td", cell.text, class_=names or None, data_value=value)


def facts(caption: str, pairs: Iterable[tuple[Any, Any]]) -> Markup:
    """A list of names and values as a small table of two columns."""
    return table(caption, ("key", "value"), [(key, value) for key, value in pairs], text_columns=2, small=True)
