"""Keeps the measured tables of README and docs: records runs in docs/evidence, writes the tables from there, and runs claims again.

    python docs/evidence.py record NAME RUN --claims a+p,b+p --data "ttcfast generate ..." --command "ttcfast run_ttc ..."
    python docs/evidence.py tables            # rewrites every block <!-- evidence: NAME ... --> ... <!-- end -->, and every block
                                              # <!-- table: NAME --> ... <!-- end --> from a command's own table kept in that folder,
                                              # whole or, without its notes, some columns: <!-- table: NAME 1 3 4 -->
    python docs/evidence.py check             # fails where a table is not what its record says
    python docs/evidence.py rerun NAME --seed 5 --work FOLDER    # new data by another random seed, the same command, the claims again

A block names a record and may choose ``rows=a,b+p`` (``+p``: with projection) and ``steps=1,4,16``, of which the last has its
interval. A claim is a row whose error over the deterministic rollout's at the last step was recorded with a 95 % interval. Run again, it
holds if the new ratio lies in that interval, or the new interval overlaps it: both are estimates from their own problems.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "evidence"
PAGES = ("README.md", "docs/*.md", "examples/README.md")
WHOLE = re.compile(r"(<!-- table: (?P<name>\w+)(?P<columns>[\d ]*) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- evidence: (?P<name>\w+)(?P<options>[^>]*) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
BASE = "deterministic"
KEPT = (
    "method",
    "projection",
    "branching_factor",
    "gain_mean_percent",
    "gain_improved_percent",
    "seconds",
    "peak_bytes",
    "blown_up",
    "over",
)
COUNTS = ("evaluations", "reward_evaluations", "solver_steps")


class EvidenceError(Exception):
    """What is wrong, in one line for the user."""


def key(row: dict[str, Any]) -> str:
    """Return the name of a row in blocks and claims: ``prm_corrector``, or ``prm_corrector+p`` with projection."""
    return str(row["method"]).replace(" ", "_") + ("+p" if row["projection"] else "")


def record(name: str, run: Path, *, command: str, data: Sequence[str], claims: Sequence[str], folder: Path = FOLDER) -> Path:
    """Reduce the metrics.json of a run to what tables need, and keep it with the commands that made it.

    Raises:
        EvidenceError: There are no metrics, or a claim is no row of them.
    """
    path = run / "metrics.json"
    if not path.is_file():
        raise EvidenceError(f"{run} holds no metrics.json; give the out= folder of a finished run")
    found = json.loads(path.read_text())
    measured = re.compile(r"(mse_step|variance_octave)_.*|drift_(?!by_step).*")
    rows = [{name: _rounded(row[name]) for name in row if name in (*KEPT, *COUNTS) or measured.fullmatch(name)} for row in found["methods"]]
    if unknown := sorted(set(claims) - {key(row) for row in rows}):
        raise EvidenceError(f"claims names {', '.join(unknown)}; the run has {', '.join(key(row) for row in rows)}")
    about = {k: found["provenance"].get(k) for k in ("git", "versions", "host", "time") if k in found["provenance"]}
    held = {"command": command, "data": list(data), "claims": list(claims), "about": about}
    held |= {k: found[k] for k in ("problems", "steps", "horizons")} | {"rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{name}.json"
    out.write_text(json.dumps(held, indent=1) + "\n")
    return out


def table(name: str, options: str, folder: Path = FOLDER) -> str:
    """Return the Markdown table of a block.

    Raises:
        EvidenceError: There is no such record, row, step or option.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise EvidenceError(f"evidence: {name} is not recorded; there are {', '.join(sorted(p.stem for p in folder.glob('*.json')))}")
    held = json.loads(path.read_text())
    chosen = dict(part.split("=", 1) for part in options.split() if "=" in part)
    if wrong := [part for part in options.split() if part.split("=")[0] not in ("rows", "steps")]:
        raise EvidenceError(f"evidence: {name} has the option {wrong[0]}; there are rows= and steps=")
    rows = {key(row): row for row in held["rows"]}
    names = chosen["rows"].split(",") if "rows" in chosen else list(rows)
    steps = [int(h) for h in chosen["steps"].split(",")] if "steps" in chosen else held["horizons"]
    if missing := [n for n in names if n not in rows] + [f"step {h}" for h in steps if h not in held["horizons"]]:
        raise EvidenceError(f"evidence: {name} has no {missing[0]}; there are {', '.join(rows)}, at steps {held['horizons']}")
    states = held["problems"] * held["steps"]
    heads = [
        "",
        *(f"error at step {h}" for h in steps),
        f"over deterministic, step {steps[-1]}",
        "s",
        "evaluations a step: model / reward / solver",
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for n in names:
        row = rows[n]
        errors = [_number(row[f"mse_step_{h}"]) for h in steps]
        errors[-1] += _interval(row[f"mse_step_{steps[-1]}_low"], row[f"mse_step_{steps[-1]}_high"])
        ratio, low, high = (row.get("over", {}).get(BASE, {}).get(str(steps[-1]), [None] * 3)) if n != BASE else (None, None, None)
        over = "1" if n == BASE else "–" if ratio is None else _number(ratio, 2) + _interval(low, high, 2)
        spent = [f"{row[c] / states:.3g}" for c in COUNTS]
        lines.append([_label(row), *errors, over, f"{row['seconds']:.0f}", " / ".join(spent)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that may hold blocks."""
    return sorted(path for pattern in PAGES for path in root.glob(pattern))


def rewritten(text: str, folder: Path = FOLDER) -> str:
    """Return a page with the table of every block as its record says."""
    text = WHOLE.sub(lambda m: m[1] + whole(m["name"], m["columns"], folder) + m[5], text)
    return BLOCK.sub(lambda m: m[1] + table(m["name"], m["options"], folder) + m[5], text)


def whole(name: str, columns: str = "", folder: Path = FOLDER) -> str:
    """Return a table that a command wrote, as it stands in ``NAME.md``, or without its notes those columns, counted from 1.

    Tables that follow each other have the same rows, and their columns are counted on.
    """
    path = folder / f"{name}.md"
    if not path.is_file():
        raise EvidenceError(f"table: {name} is not there; there are {', '.join(sorted(p.stem for p in folder.glob('*.md')))}")
    text = path.read_text()
    if not columns.strip():
        return text
    parts = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    rows = ["".join(line.strip().removesuffix("|") for line in lines).removeprefix("|").split("|") for lines in zip(*parts, strict=True)]
    picked = [int(column) - 1 for column in columns.split()]
    return "".join("| " + " | ".join(row[c].strip() for c in picked) + " |\n" for row in rows)


def tables(root: Path = ROOT, folder: Path = FOLDER) -> list[Path]:
    """Rewrite the blocks of all pages; return the pages that changed."""
    changed = []
    for page in pages(root):
        before = page.read_text()
        if (after := rewritten(before, folder)) != before:
            page.write_text(after)
            changed.append(page)
    return changed


def check(root: Path = ROOT, folder: Path = FOLDER) -> None:
    """Raise ``EvidenceError`` where a table is not what its record says."""
    for page in pages(root):
        text = page.read_text()
        right = [(found, whole(found["name"], found["columns"], folder)) for found in WHOLE.finditer(text)]
        right += [(found, table(found["name"], found["options"], folder)) for found in BLOCK.finditer(text)]
        for found, expected in right:
            if found["table"] != expected:
                raise EvidenceError(
                    f"{page.relative_to(root)}: the table of {found['name']} is not its record's; run docs/evidence.py tables"
                )


def rerun(name: str, seed: int, work: Path, *, run: Callable[[list[str]], None], folder: Path = FOLDER) -> list[tuple[str, bool, str]]:
    """Make the data of a record with another random seed, run its command on them and compare its claims.

    Args:
        name: The record.
        seed: Random seed of the data.
        work: Folder for data and run, new or empty.
        run: Runs a command, given as its arguments.

    Returns:
        For every claim its name, whether it holds, and both ratios in words.

    Raises:
        EvidenceError: There is no such record, it does not name its data by one folder, or ``work`` is not empty.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        raise EvidenceError(f"{name} is not recorded; there are {', '.join(sorted(p.stem for p in folder.glob('*.json')))}")
    if work.exists() and any(work.iterdir()):
        raise EvidenceError(f"work is {work}, which is not empty; give a new folder")
    held = json.loads(path.read_text())
    command = [part for part in shlex.split(held["command"]) if not part.startswith("out=")]
    made = [[part for part in shlex.split(line) if not part.startswith("seed=")] for line in held["data"]]
    for number, parts in enumerate(made):
        old, new = next((part[4:] for part in parts if part.startswith("out=")), "?"), str(work / f"data{number}")
        if not any(part.endswith(f"={old}") for part in command):
            raise EvidenceError(f"{name}: its command does not read {old}, where its data lie; record both with the same folder")
        command = [part.removesuffix(old) + new if part.endswith(f"={old}") else part for part in command]
        made[number] = [*(f"out={new}" if part == f"out={old}" else part for part in parts), f"seed={seed}"]
    for parts in (*made, [*command, f"out={work / 'run'}"]):
        run(parts)
    new = {key(row): row for row in json.loads((work / "run" / "metrics.json").read_text())["methods"]}
    last, before = str(held["horizons"][-1]), {key(row): row for row in held["rows"]}
    return [(claim, *_holds(before[claim]["over"][BASE][last], new[claim]["over"][BASE][last])) for claim in held["claims"]]


def _holds(old: Sequence[float | None], new: Sequence[float | None]) -> tuple[bool, str]:
    words = f"{_number(new[0], 2)}{_interval(*new[1:], 2)}, recorded {_number(old[0], 2)}{_interval(*old[1:], 2)}"
    ratio, low, high, least, most = (math.nan if value is None else value for value in (*new, *old[1:]))  # NaN is in no interval
    inside, overlap = least <= ratio <= most, low <= most and least <= high
    return inside or overlap, words + (": inside" if inside else ": intervals overlap" if overlap else ": outside")


def _label(row: dict[str, Any]) -> str:
    from ttcfast.evaluation.results import LABELS

    return LABELS.get(row["method"], row["method"]) + (" + projection" if row["projection"] else "")


def _number(value: float | None, digits: int = 3) -> str:
    return "blew up" if value is None else f"{value:.{digits}f}" if digits == 2 and value >= 0.1 else f"{value:.{digits}g}"


def _interval(low: float | None, high: float | None, digits: int = 3) -> str:
    return "" if low is None or high is None else f" [{_number(low, digits)}, {_number(high, digits)}]"


def _rounded(value: Any) -> Any:
    """Round numbers to six digits, in whatever holds them."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _ran(arguments: list[str]) -> None:
    """Run ``ttcfast ...`` with this interpreter."""
    print("$ " + shlex.join(arguments), flush=True)
    own = [sys.executable, "-m", "ttcfast.cli.main", *arguments[1:]] if arguments[0] == "ttcfast" else arguments
    if code := subprocess.run(own, cwd=ROOT, check=False).returncode:
        raise EvidenceError(f"{shlex.join(arguments)} ended with status {code}")


def main(given: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("name")
    recording.add_argument("run", type=Path)
    recording.add_argument("--command", required=True)
    recording.add_argument("--data", action="append", default=[])
    recording.add_argument("--claims", default="")
    commands.add_parser("tables")
    commands.add_parser("check")
    again = commands.add_parser("rerun")
    again.add_argument("name")
    again.add_argument("--seed", type=int, required=True)
    again.add_argument("--work", type=Path, required=True)
    args = parser.parse_args(None if given is None else list(given))
    try:
        if args.do == "record":
            claims = [claim for claim in args.claims.split(",") if claim]
            print(record(args.name, args.run, command=args.command, data=args.data, claims=claims))
        elif args.do == "tables":
            print("\n".join(map(str, tables())) or "nothing changed")
        elif args.do == "check":
            check()
        else:
            found = rerun(args.name, args.seed, args.work, run=_ran)
            for claim, holds, words in found:
                print(f"{'holds' if holds else 'FAILS'}  {claim}: {words}")
            return int(not all(holds for _, holds, _ in found))
    except EvidenceError as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
