"""Section on the seconds per frame of surrogate and classical solver."""

from __future__ import annotations

from pathlib import Path

from ttcfast.report.outputs import BREAKEVEN
from ttcfast.runtime.files import parse_json, require_regular

from .html import Markup, joined, number, table, tag


def breakeven_section(folder: Path) -> Markup | None:
    """Tabulate the seconds per frame by batch size and grid; None if the run timed none."""
    path = folder / BREAKEVEN
    if not path.exists():
        return None
    held = parse_json(require_regular(path, "record", "make the run again").read_text(encoding="utf-8"))
    rows = []
    for each in held["batches"]:
        ours, theirs = each["surrogate_seconds"], each["solver_seconds"]
        for cells in sorted({*ours, *theirs}, key=int):
            one, other = ours.get(cells), theirs.get(cells)
            ratio = one / other if one is not None and other is not None else None
            rows.append([number(each["batch"]), number(int(cells)), number(one), number(other), number(ratio)])
    heads = ("batch", "cells per axis", "surrogate s", "solver s", "surrogate / solver")
    notes = tag("ul", [tag("li", note) for note in held["notes"]], class_="notes")
    return joined(tag("h3", "Breakeven"), table("Seconds per problem and frame, on the same grid", heads, rows), notes)
