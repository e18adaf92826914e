"""``python -m bench <group>...``: times groups of cases against their peers and writes the rows as CSV."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from ttcfast.ops.registry import one_line
from ttcfast.runtime.errors import ArgumentError, UserError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.locks import run_lock
from ttcfast.runtime.progress import bar

from . import environment, groups, rows, tables
from .clocks import clock_for
from .timing import LEAST_SECONDS, Case, measure

DONE, FAILED, BAD_ARGUMENTS = 0, 1, 2
RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named groups. Returns the exit status: 1 if a gate or a peer failed, 2 for bad arguments."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    known = groups.names()
    unknown = [name for name in asked.groups if name not in (*known, "all")]
    if unknown or not asked.groups:
        text = f"no group {', '.join(map(repr, unknown))}" if unknown else "no group given"
        print(f"bench: {text}; known: {', '.join(known)}, or all", file=sys.stderr)
        return BAD_ARGUMENTS
    asked.rounds = asked.rounds or (3 if asked.quick else 9)
    groups.autotuned = not asked.untuned
    chosen = known if "all" in asked.groups else list(dict.fromkeys(asked.groups))
    if asked.list:
        for group in chosen:
            print(tables.listing(list(groups.cases(group, asked.device)), groups.targets(group)))
        return DONE
    try:
        chosen = [group for group in chosen if next(_cases(group, asked), None) is not None]
        if not chosen:
            raise ArgumentError(f"--case is {asked.case!r}, which no case of {', '.join(asked.groups)} matches; --list names them")
        return max([(gates if asked.gates else run)(group, asked) for group in chosen])
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.status


def run(group: str, asked: argparse.Namespace) -> int:
    """Measure one group and print each case as it finishes. Rows are written after every case, so a killed run keeps what it measured."""
    partial = asked.quick or asked.untuned or asked.case != "*"  # would overwrite complete results
    place = asked.out or (None if partial else RESULTS)
    path = None if place is None else output_folder(place) / f"{group}-{environment.slug(asked.device)}.csv"
    with contextlib.nullcontext() if path is None else run_lock(path, file=True):
        return _measure_all(group, asked, path)


def _measure_all(group: str, asked: argparse.Namespace, path: Path | None) -> int:
    found: list[rows.Row] = []
    counts = asked.threads if asked.device == "cpu" else [1]
    with bar(len(counts) * sum(1 for _ in _cases(group, asked)), f"bench {group}", still=True) as progress:
        for case in _cases(group, asked):
            for threads in counts:
                least = LEAST_SECONDS / 4 if asked.quick else LEAST_SECONDS
                quick = asked.quick or asked.untuned
                measured = measure(case, rounds=asked.rounds, threads=threads, least_seconds=least, quick=quick)
                found += measured
                print(tables.measured(measured), flush=True)
                if path is not None:
                    rows.write(path, found)
                progress.advance()
    for row in () if asked.quick else groups.further(group, asked.device, asked.case):
        found.append(row)
        print(tables.measured([row]), flush=True)
        if path is not None:
            rows.write(path, found)
    print(tables.targets(groups.targets(group), found))
    print(f"{len(found)} rows {'not written (--quick, --untuned or --case without --out)' if path is None else f'in {path}'}")
    return FAILED if any(row.status != rows.OK for row in found) else DONE


def gates(group: str, asked: argparse.Namespace) -> int:
    """Run every gate and every peer once, at sizes of a few cells, which a memory checker can handle in reasonable time."""
    failed = 0
    clock_for(asked.device)  # raises if there is no such device
    for case in _cases(group, asked, tiny=True):
        said = "passed"
        try:
            case.check()
            for peer in case.peers.values():
                peer()
        except Exception as error:
            failed, said = failed + 1, f"FAILED: {type(error).__name__}: {one_line(error)}"
        print(f"{group}/{case.name}: {said}", flush=True)
    if asked.device == "cuda":
        torch.cuda.synchronize()
    return FAILED if failed else DONE


def _cases(group: str, asked: argparse.Namespace, *, tiny: bool = False) -> Iterator[Case]:
    """Return the cases that ``--case`` selects."""
    return (case for case in groups.cases(group, asked.device, tiny=tiny) if fnmatchcase(case.name, asked.case))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"{', '.join(groups.names())}, or all")
    parser.add_argument("--list", action="store_true", help="list the cases and targets of the groups and exit")
    parser.add_argument("--gates", action="store_true", help="only check that the peers agree, at sizes of a few cells; no timing")
    parser.add_argument("--case", default="*", metavar="NAME", help="cases to run, with wildcards * and ?; written only with --out")
    parser.add_argument("--threads", type=_positive, nargs="+", default=[1, 2], metavar="N", help="numbers of CPU threads (1 2)")
    parser.add_argument("--rounds", type=_positive, default=None, metavar="N", help="samples of each peer (9; 3 with --quick)")
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="folder of the CSV files (bench/results)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"({default} here)")
    parser.add_argument("--quick", action="store_true", help="few short samples, as a smoke test; written only with --out")
    parser.add_argument("--untuned", action="store_true", help="no max-autotune, for a first pass on a GPU; not to be quoted")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1 (groups come before the options)")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
