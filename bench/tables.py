"""Formats measurements as aligned plain-text tables, identical in files and on terminals."""

from __future__ import annotations

from collections.abc import Sequence

from . import targets as target_module
from .rows import OK, Row
from .timing import Case

MISSING = "–"


def listing(cases: Sequence[Case], wanted: Sequence[target_module.Target]) -> str:
    """List the cases of a group with their peers, and its targets."""
    lines = [("case", "shape", "dtype", "ours", "peers")]
    lines += [(f"{c.group}/{c.name}", c.shape, c.dtype, c.ours, "; ".join(p for p in c.peers if p != c.ours)) for c in cases]
    text = aligned(lines)
    return f"{text}\n{targets(wanted, [])}" if wanted else text


def measured(rows: Sequence[Row]) -> str:
    """Format the rows of one case at one number of threads."""
    first = rows[0]
    title = f"\n{first.group}/{first.case}  {first.shape} {first.dtype}, {first.device_name}"
    title += f", {first.threads} thread{'s' * (first.threads > 1)}" if first.device == "cpu" else ""
    timed = [row for row in rows if row.status == OK]
    if not timed:
        return "\n".join([title, *(f"  {row.status.upper()}: {row.error}" for row in rows)])
    lines: list[tuple[str, ...]] = [
        ("peer", "p20", "p50", "p80", "ratio", "GB/s", "of read", "of copy", "graph p50", "ratio", "hot", "ratio")
    ]
    for row in timed:
        times = [_time(x) for x in (row.p20_us, row.p50_us, row.p80_us)]
        rates = [_number(row.gb_per_s, ".1f"), _number(row.share_of_read, ".0%"), _number(row.share_of_copy, ".0%")]
        graph = [_time(row.graph_p50_us), _ratio(row.graph_ratio), _time(row.graph_hot_us), _ratio(row.graph_hot_ratio)]
        lines.append((row.peer + " (ours)" * (row.peer == row.ours), *times, _ratio(row.ratio), *rates, *graph))
    if first.device == "cpu":
        lines = [line[:8] for line in lines]
    text = [title, aligned(lines)]
    if timed[0].read_gb_per_s is not None or timed[0].copy_gb_per_s is not None:
        text.append(f"  ceilings: read {_number(timed[0].read_gb_per_s, '.1f')} GB/s, copy {_number(timed[0].copy_gb_per_s, '.1f')} GB/s")
    text += [f"  {row.peer}: {row.graph_note}" for row in timed if row.graph_note]
    text += [f"  {row.status.upper()}: {row.peer}: {row.error}" for row in rows if row.status != OK]
    return "\n".join([*text, f"  {first.note}"] if first.note else text)


def targets(wanted: Sequence[target_module.Target], rows: Sequence[Row]) -> str:
    """Format each target with the value measured for it, ``–`` if there is none."""
    if not wanted:
        return ""
    lines = [("target", "device", "threads", "case", "peer", "bound", "measured", "")]
    for target in wanted:
        start = (target.column, target.device, str(target.threads) if target.device == "cpu" else "")
        told = (target.peer or "(ours)", target.bound)
        found = [
            (*start, row.case, *told, f"{value:.3g}", "met" if target.met_by(value) else "MISSED") for row, value in target.measured(rows)
        ]
        lines += found or [(*start, target.case, *told, MISSING, "not measured here")]
    return f"\n{aligned(lines)}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Align lines, the first of which is the heading, into columns; columns of numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = [all(_numeric(cell) for cell in column[1:]) and len(column) > 1 for column in zip(*lines)]
    out = []
    for line in lines:
        cells = [cell.rjust(width) if lean else cell.ljust(width) for cell, width, lean in zip(line, widths, right)]
        out.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(out)


def _numeric(cell: str) -> bool:
    return cell[:1].isdigit() or cell in ("", MISSING)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}x"


def _time(us: float | None) -> str:
    if us is None:
        return MISSING
    return f"{us:.2f} us" if us < 1e3 else f"{us / 1e3:.3f} ms" if us < 1e6 else f"{us / 1e6:.3f} s"
