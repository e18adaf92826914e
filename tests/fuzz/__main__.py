"""Random calls of every operation against the reference and numpy: ``python -m tests.fuzz --seconds 60 [--seed S] [--op NAME]``.

The calls are made in a child process. Where that crashes, hangs or is killed, the case that it was at is a failure like any other, and
another child goes on behind it. Each failure comes with the line that makes it again, and the exit status is then 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HANGS = 120  # seconds that a single case may take; none takes one
MOST_FAILURES = 20
CHILD = [sys.executable, "-m", "tests.fuzz"]  # a test puts a broken operation in its place


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, help="of all cases; a new one each time where it is not given, and printed")
    parser.add_argument("--op", help="this operation alone")
    parser.add_argument("--case", type=int, help="this one case of --op and --seed, here and now, with its trace")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)  # in a child: the case to begin with
    options = parser.parse_args(arguments)
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    if options.first is not None or options.case is not None:
        from tests.fuzz.ops import OPS

        if options.op not in (None, *OPS):
            parser.error(f"--op is {options.op!r}; the operations are {', '.join(OPS)}")
        names = [options.op] if options.op else list(OPS)
        if options.case is not None:
            return run_one(seed, names[0], options.case)
        return run_many(seed, names, options.first, time.monotonic() + options.seconds)
    calls, failures = watch(seed, options.op, options.seconds)
    print(f"{calls} calls, {len(failures)} failures (seed {seed})")
    return 1 if failures or not calls else 0


def run_one(seed: int, op: str, number: int) -> int:
    from tests.fuzz.draw import Draw
    from tests.fuzz.ops import OPS

    OPS[op](Draw(seed, op, number))
    print(f"{op} {number}: no failure")
    return 0


def run_many(seed: int, names: list[str], first: int, end: float) -> int:
    """One case of each operation after the other, from ``first`` on: a line before each, and one after it."""
    from tests.fuzz.draw import Draw
    from tests.fuzz.ops import OPS

    faulthandler.enable()
    number = first
    while time.monotonic() < end:
        op = names[number % len(names)]
        print(f"begin {op} {number}", flush=True)
        try:
            OPS[op](Draw(seed, op, number))
            print("good", flush=True)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())
            print(f"bad {type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {text}", flush=True)
        number += 1
    print("done", flush=True)
    return 0


def watch(seed: int, op: str | None, seconds: float) -> tuple[int, list[str]]:
    """Children, one after the other, until the time is over; how many calls there were, and what failed."""
    calls, failures, first, end = 0, [], 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and len(failures) < MOST_FAILURES:
        command = [*CHILD, "--seed", str(seed), "--first", str(first), "--seconds", str(left), *(["--op", op] if op else [])]
        with tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
            at, finished = "", False
            for line in lines_of(child):
                word, _, rest = line.partition(" ")
                finished |= word == "done"
                if word == "begin":
                    at, calls = rest, calls + 1
                elif word == "bad":
                    report(failures, seed, at, rest)
                    if len(failures) >= MOST_FAILURES:
                        break
                if word in ("good", "bad"):
                    first, at = int(at.split()[1]) + 1 if at else first, ""
            hangs = child.poll() is None
            child.kill()
            status = child.wait()
            errors.seek(0)
            told = errors.read().decode(errors="replace").strip()
        if finished or len(failures) >= MOST_FAILURES:
            continue
        if not at:
            raise SystemExit(f"the child process ended with status {status} before its first case:\n{told}")
        report(failures, seed, at, f"the process {'hung' if hangs else 'crashed or was killed'} (status {status}): {told[-3000:]}")
        first = int(at.split()[1]) + 1
    return calls, failures


def lines_of(child: subprocess.Popen[bytes]) -> Iterator[str]:
    """What it prints, until it ends or has been silent for too long; then it is killed."""
    assert child.stdout is not None
    rest = b""
    while select.select([child.stdout], [], [], HANGS)[0]:
        found = os.read(child.stdout.fileno(), 1 << 16)
        if not found:
            child.wait()  # its own status, not that of a kill
            return
        *whole, rest = (rest + found).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)


def report(failures: list[str], seed: int, at: str, what: str) -> None:
    op, number = at.split()
    failures.append(at)
    print(f"FAILED {op}: {what}\n  again: python -m tests.fuzz --seed {seed} --op {op} --case {number}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
