"""Writes the measured tables and figures of the pages, from ``bench/results`` alone: ``python -m bench.report``, or ``make bench``.

A block ``<!-- bench: NAME -->`` ... ``<!-- end -->`` of a page holds the table of that name; what stands around it is written by hand.
``--check`` writes nothing and has status 1 where a page or a figure is not what the rows say. Rows called quick are left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from . import plots
from .claims import COMPARISONS, CPU, CUDA, README, Operation
from .rows import OK, Row, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- bench: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
CLAIMS = tuple(dict.fromkeys((*CPU, *CUDA)))
NO_GPU = "not measured: no GPU was at hand"
NOT_MEASURED = "not measured"
AXES = {
    "B": "candidates B, 4x4 cells",
    "grid": "cells of a side, 8 candidates",
    "k": "k of a million scores",
    "K": "steps K of Heun's method, batch 256",
    "processes": "processes that share 64 candidates of the shipped surrogate",
}
WIDEST = 55  # characters beside a figure; what is longer goes without its shape
FASTEST = 0.98  # a peer above this is not called faster: medians of one run differ by as much


def load(folder: Path = RESULTS) -> list[Row]:
    """Return the rows to be quoted, the newest of each machine, case, peer and number of threads."""
    newest: dict[tuple[object, ...], Row] = {}
    for path in sorted(folder.rglob("*.csv")):
        for row in read(path):
            key = (row.device_name, row.threads, row.group, row.case, row.shape, row.peer, row.peak_mb is None)
            if not row.quick and (key not in newest or newest[key].date <= row.date):
                newest[key] = row
    return list(newest.values())


def of(rows: Iterable[Row], group: str, case: str, *, threads: int = 1) -> list[Row]:
    """Return the timed rows of a case of one machine, or those that say why there is none."""
    return [row for row in rows if (row.group, row.case, row.threads) == (group, case, threads) and row.peak_mb is None]


def strongest(rows: Sequence[Row]) -> Row | None:
    """Return the fastest of the peers that are not ours, among rows of one case."""
    timed = [row for row in rows if row.status == OK and row.peer != row.ours and row.ratio is not None]
    return min(timed, key=lambda row: row.ratio or 0.0, default=None)


def memory_share(row: Row) -> float | None:
    """Return the bandwidth of ``row`` over the higher of the read and copy rates that were measured beside it."""
    shares = [share for share in (row.share_of_read, row.share_of_copy) if share is not None]
    return min(shares, default=None)


def machines(rows: Iterable[Row], device: str) -> dict[str, list[Row]]:
    """Return the rows by machine, the one with the most claims first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.device == device:
            found.setdefault(row.device_name, []).append(row)
    claims = {name: sum(bool(of(own, claim.group, claim.case)) for claim in CLAIMS) for name, own in found.items()}
    return dict(sorted(found.items(), key=lambda item: (-claims[item[0]], item[0])))


def operations(rows: Sequence[Row], device: str) -> str:
    """Return a table of the operations for every machine, and what was measured on none."""
    claims = _claims(device)
    heads = ["operation", "problem", "plain torch", "strongest peer", "its ratio", "two threads", "of the memory rate"]
    if device == "cuda":
        heads[-2] = "as a graph"
    missing = list(claims)
    parts = []
    for name, own in machines(rows, device).items():
        lines = [heads, ["---", "---", "---:", "---", *["---:"] * 3]]
        used = list[Row]()
        for claim in claims:
            if one := of(own, claim.group, claim.case):
                lines.append(_operation(claim, one, of(own, claim.group, claim.case, threads=2)))
                used += one
                missing = [each for each in missing if each is not claim]
        if used:
            parts.append(f"**{name}**, {'one call' if device == 'cuda' else 'one thread'} ({_when(used)})\n\n{_markdown(lines)}")
    if missing:
        said = NO_GPU if device == "cuda" and not machines(rows, device) else NOT_MEASURED
        lines = [["operation", "case", ""], ["---"] * 3, *([_name(claim), claim.case, said] for claim in missing)]
        parts.append(_markdown(lines))
    if device == "cpu" or machines(rows, device):
        parts.append(f"![Ratio of every operation to its strongest peer](images/bench_peers_{device}.png)\n")
        parts.append(f"![Share of the memory rate by operation](images/bench_memory_{device}.png)\n")
    return "\n".join(parts)


def _operation(claim: Operation, one: Sequence[Row], two: Sequence[Row]) -> list[str]:
    own = next((row for row in one if row.peer == row.ours), one[0])
    if own.status != OK:
        return [_name(claim), own.shape, own.status, *[""] * 4]
    plain, best, best_of_two = next((row for row in one if row.peer == claim.plain), None), strongest(one), strongest(two)
    last = best.graph_ratio if best and own.device == "cuda" else best_of_two.ratio if best_of_two else None
    share = memory_share(own)
    told = [_times(plain.ratio if plain else None), best.peer if best else "–", _times(best.ratio if best else None), _times(last)]
    return [_name(claim), own.shape, *told, "–" if share is None else f"{share:.0%}"]


def comparisons(rows: Sequence[Row]) -> str:
    """Return a table of the other comparisons, a column for every machine."""
    found = machines(rows, "cpu") | machines(rows, "cuda")
    cells = {
        claim: [_compared(of(own, claim.group, claim.case), claim.fast, claim.slow, claim.share) for own in found.values()]
        for claim in COMPARISONS
    }
    told = [name for place, name in enumerate(found) if any(row[place] for row in cells.values())]
    lines = [["what", *told], ["---", *["---:"] * len(told)]]
    for claim, row in cells.items():
        kept = [cell for name, cell in zip(found, row) if name in told]
        lines.append([claim.what, *(cell or NOT_MEASURED if not any(kept) else cell or "–" for cell in kept)])
    return _markdown(lines)


def _compared(rows: Sequence[Row], fast: str, slow: str, share: bool) -> str:
    spent = {row.peer: row.p50_us for row in rows if row.status == OK and row.p50_us}
    if fast not in spent or slow not in spent:
        return ""
    quotient = (spent[fast] or 0) / (spent[slow] or 1)
    return (f"{quotient:.1%}" if quotient < 0.1 else f"{quotient:.0%}") if share else _times(1 / quotient)


def slower(rows: Sequence[Row]) -> str:
    """Return a table of all cases of the operations in which a peer is faster than ours, the worst first."""
    groups = {"scaling", *(claim.group for claim in CLAIMS)}
    found = []
    for name, own in (machines(rows, "cpu") | machines(rows, "cuda")).items():
        for group, case, threads in dict.fromkeys((row.group, row.case, row.threads) for row in own if row.group in groups):
            best = strongest(of(own, group, case, threads=threads))
            if best and best.ratio is not None and best.ratio < FASTEST:
                found.append((best.ratio, [f"{group}, {case}", name, str(threads), best.peer, _times(best.ratio)]))
    if not found:
        return "No peer is faster in any row.\n"
    return _markdown(
        [
            ["case", "machine", "threads", "faster peer", "ratio"],
            ["---", "---", "---:", "---", "---:"],
            *(line for _, line in sorted(found)),
        ]
    )


def short(rows: Sequence[Row]) -> str:
    """Return the six rows of README, each of the machine with the most rows that has it."""
    lines = [
        ["operation", "problem", "against plain PyTorch", "against the strongest peer", "one thread of"],
        ["---", "---", "---:", "---:", "---"],
    ]
    for claim in (claim for case in README for claim in CPU if claim.case == case):
        measured = [(name, one) for name, own in machines(rows, "cpu").items() if (one := of(own, claim.group, claim.case))]
        if not measured:
            lines.append([_name(claim), claim.case, NOT_MEASURED, NOT_MEASURED, "–"])
            continue
        what, problem, plain, peer, ratio, *_ = _operation(claim, measured[0][1], [])
        lines.append([what, problem, plain, f"{ratio} ({peer})", measured[0][0]])
    return _markdown(lines)


def figures(rows: Sequence[Row], root: Path = ROOT) -> dict[Path, plots.Drawing]:
    """Return what the figures show, by their paths; of a GPU once there are rows."""
    found: dict[str, plots.Drawing] = {}
    for device in ("cpu", *(["cuda"] if machines(rows, "cuda") else [])):
        for peers in (True, False):
            found[f"bench_{'peers' if peers else 'memory'}_{device}"] = _figure(rows, device, peers)
    if curves := scaling(rows):
        found["bench_scaling"] = curves
    return {root / "docs" / "images" / f"{name}.png": data for name, data in found.items()}


def _figure(rows: Sequence[Row], device: str, peers: bool) -> plots.Dots:
    """Return the ratio to the strongest peer, or the share of the memory rate, of every claim that a machine has measured."""
    series = []
    for colour, (name, own) in enumerate(machines(rows, device).items()):
        for threads in (1, 2) if peers and device == "cpu" else (1,):
            values = {claim: _dot(of(own, claim.group, claim.case, threads=threads), peers) for claim in _claims(device)}
            count = "" if device == "cuda" else f", {'one thread' if threads == 1 else 'two threads'}"
            series.append((name + count, threads == 2, colour, values))
    shown = [claim for claim in _claims(device) if any(values[claim] is not None for *_, values in series)]
    shapes = {row.case: row.shape for row in rows if row.device == device}
    labels = [(_name(claim).replace("`", ""), shapes[claim.case]) for claim in shown]
    title = "How many times faster than the strongest peer" if peers else "Share of the memory rate, one thread"
    return plots.Dots(
        title=title if device == "cpu" else title.removesuffix(", one thread"),
        label="ratio to the strongest peer" if peers else "higher of the read and copy rates of the same run = 1",
        names=tuple(f"{name}  {shape}" if len(name + shape) < WIDEST else name for name, shape in labels),
        series=tuple((name, hollow, at, tuple(map(values.get, shown))) for name, hollow, at, values in series if any(values.values())),
        line=1.0,
        log=peers,
        note="" if machines(rows, "cuda") else f"GPU: {NO_GPU}",
    )


def _dot(rows: Sequence[Row], peers: bool) -> float | None:
    ours, best = next((row for row in rows if row.peer == row.ours and row.status == OK), None), strongest(rows)
    return (best.ratio if best else None) if peers else memory_share(ours) if ours else None


def _claims(device: str) -> tuple[Operation, ...]:
    return CUDA if device == "cuda" else CPU


def scaling(rows: Sequence[Row]) -> plots.Curves | None:
    """Return milliseconds over sizes from the rows of ``bench_scaling``, of the machine with the most; None without any."""
    found = {name: [row for row in own if row.group == "scaling" and row.status == OK] for name, own in machines(rows, "cpu").items()}
    name, own = max(found.items(), key=lambda item: len(item[1]), default=("", []))
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in own:
        what, _, size = row.case.rpartition(", ")
        axis, _, at = size.rpartition(" ")
        line = what if row.peer == row.ours else f"{what}: {row.peer}"
        lines.setdefault(axis, {}).setdefault(line, []).append((float(at), (row.p50_us or 0.0) / 1000))
    panels = []
    for axis, each in lines.items():
        curves = [(line, tuple(x for x, _ in sorted(points)), tuple(y for _, y in sorted(points))) for line, points in each.items()]
        panels.append((AXES.get(axis, axis), tuple(curves)))
    return plots.Curves(f"Time of one call over its size, one thread of {_an(name)}", tuple(panels)) if panels else None


def everything(rows: Sequence[Row]) -> str:
    """Return the page of all rows, a table for every group and machine."""
    text = ["# Measured rows", ""]
    text += ["How many times slower each peer is than ours, from one run each; `-` where a peer was not measured there.", ""]
    tables: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tables.setdefault((row.group, row.device_name), []).append(row)
    for (group, name), own in sorted(tables.items()):
        text += [f"## {group}, {name}", ""]
        cases: dict[tuple[str, str, str, int], list[Row]] = {}
        for row in own:
            cases.setdefault((row.case, row.shape, row.dtype, row.threads), []).append(row)
        lines = [["case", "shape", "dtype", "threads", "ours", "peers"], ["---", "---", "---", "---:", "---:", "---"]]
        for (case, shape, dtype, threads), each in cases.items():
            ours = next((row for row in each if row.peer == row.ours), each[0])
            others = "; ".join(f"{row.peer}: {_times(row.ratio) if row.ratio else _spent(row)}" for row in each if row is not ours)
            lines.append([case, shape, dtype, str(threads), _spent(ours), others or "-"])
        text += [_markdown(lines)]
    return "\n".join(text)


def _spent(row: Row) -> str:
    if row.p50_us is not None:
        return f"{row.p50_us:.4g} us"
    return row.status if row.peak_mb is None else f"{row.peak_mb:.0f} MiB"


def _name(claim: Operation) -> str:
    return claim.name + (f", {claim.words}" if claim.words else "")


def _an(name: str) -> str:
    return f"{'an' if name[:1] in 'AEIO' else 'a'} {name}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" if ratio >= 2 else f"{ratio:.2f}x"


def _when(rows: Sequence[Row]) -> str:
    dates = sorted(row.date[:10] for row in rows)
    commits = dict.fromkeys(row.commit[:7] for row in rows)
    return f"{dates[0] if dates[0] == dates[-1] else f'{dates[0]} to {dates[-1]}'}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "operations-cpu": partial(operations, device="cpu"),
    "operations-cuda": partial(operations, device="cuda"),
    "comparisons": comparisons,
    "slower": slower,
    "readme": short,
}


def rewritten(text: str, rows: Sequence[Row]) -> str:
    """Return a page with the table of every block as the rows say.

    Raises:
        ValueError: A block names no table, or one does not end.
    """
    if (begun := text.count("<!-- bench: ")) != len(BLOCK.findall(text)):
        raise ValueError(f"{begun} blocks begin by <!-- bench: NAME -->, and {len(BLOCK.findall(text))} end by <!-- end -->")
    for found in BLOCK.finditer(text):
        if found["name"] not in TABLES:
            raise ValueError(f"bench: {found['name']} is no table; there are {', '.join(TABLES)}")
    return BLOCK.sub(lambda m: m[1] + TABLES[m["name"]](rows) + m[4], text)


def stale(rows: Sequence[Row], root: Path = ROOT) -> list[Path]:
    """Return the pages and figures that are not what the rows say."""
    pages = [root / name for name in PAGES if (root / name).is_file()]
    wrong = [page for page in pages if rewritten(page.read_text(encoding="utf-8"), rows) != page.read_text(encoding="utf-8")]
    return wrong + [path for path, data in figures(rows, root).items() if plots.digest_of(path) != plots.digest(data)]


def write(rows: Sequence[Row], root: Path = ROOT) -> list[Path]:
    """Write the pages and figures that are not what the rows say, and return them."""
    changed, data = stale(rows, root), figures(rows, root)
    for path in changed:
        if path in data:
            plots.draw(path, data[path])
        else:
            path.write_text(rewritten(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where something is not what the rows say")
    check = parser.parse_args(arguments).check
    rows = load()
    found = [str(path.relative_to(ROOT)) for path in (stale(rows) if check else write(rows))]
    if check and found:
        print(f"not what bench/results says: {', '.join(found)}; run make bench", file=sys.stderr)
        return 1
    print("\n".join(found) or "nothing changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
