"""Counts the instructions of every operation of csrc/counts.cpp under valgrind, and compares them with ``bench/counts.json``.

    python -m bench.counts             # status 1 where a count differs by more than 5 %
    python -m bench.counts --write     # commits to today's counts: after a gain, a change that is worth its price, or another compiler

One thread, at the level AVX2, which is the highest that valgrind runs; nothing is timed, so a busy machine finds the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "bench" / "counts.json"
BUILD = ROOT / "build" / "counts"
TOLERANCE = 0.05
NO_AVX2 = 3  # exit status of the driver
RENEW = "python -m bench.counts --write"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, count and compare. Returns the exit status; 0 where nothing can be compared, which a line tells."""
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write today's counts to bench/counts.json")
    write = parser.parse_args(arguments).write
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("!!! No valgrind on this machine: instructions were NOT counted.")
        return int(write)
    found = counts(valgrind, build())
    if found is None:
        print("!!! This processor has no AVX2: instructions were NOT counted.")
        return int(write)
    compiler, counted = found
    committed: dict[str, Any] = {"compiler": compiler, "counts": {}}
    if COMMITTED.is_file():
        committed = json.loads(COMMITTED.read_text())
    print(table(committed["counts"], counted))
    if write:
        COMMITTED.write_text(json.dumps({"compiler": compiler, "level": "avx2", "counts": counted}, indent=1) + "\n")
        print(f"{len(counted)} counts written to {COMMITTED.relative_to(ROOT)}")
        return 0
    if compiler != committed["compiler"]:
        print(f"!!! The committed counts are of {committed['compiler']}, this is {compiler}: NOT compared. {RENEW} takes these.")
        return 0
    wrong = differences(committed["counts"], counted)
    print("\n".join(wrong) if wrong else f"{len(counted)} counts within {TOLERANCE:.0%} of the committed ones")
    return int(bool(wrong))


def build() -> Path:
    """Compile the driver in ``build/counts`` and return it."""
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where pip put cmake and ninja
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DTTCFAST_CUDA=OFF"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", str(BUILD), "--target", "counts", "--parallel", "2"]):
        run = subprocess.run(
            command, env={**os.environ, "PATH": here}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if run.returncode:
            sys.exit(f"{run.stdout}bench.counts: the driver did not build (see above)")
    return BUILD / "counts"


def counts(valgrind: str, driver: Path) -> tuple[str, dict[str, int]] | None:
    """Return the driver's compiler and the instructions of each case; None without AVX2."""
    with tempfile.TemporaryDirectory() as folder:
        # A dump at every return from `counted`, of what ran inside it.
        options = ["--tool=callgrind", "--toggle-collect=counted", "--dump-after=counted", f"--callgrind-out-file={folder}/out"]
        run = subprocess.run([valgrind, *options, driver], capture_output=True, text=True, check=False)
        if run.returncode == NO_AVX2:
            return None
        if run.returncode:
            sys.exit(f"{run.stderr}bench.counts: the driver ended with status {run.returncode} under valgrind (see above)")
        compiler, *cases = run.stdout.splitlines()
        dumps = [Path(folder, f"out.{number}").read_text() for number in range(1, len(cases) + 1)]
    return compiler, {case: int(re.findall(r"^totals: (\d+)$", dump, re.MULTILINE)[0]) for case, dump in zip(cases, dumps)}


def differences(committed: Mapping[str, int], counted: Mapping[str, int]) -> list[str]:
    """Return a line for every case whose count is off by more than 5 %, or that only one side has."""
    lines = []
    for case in dict.fromkeys([*committed, *counted]):
        before, now = committed.get(case), counted.get(case)
        if before is None or now is None:
            lines.append(f"{case}: has no {'committed count' if before is None else 'case in csrc/counts.cpp'}; {RENEW}")
        elif now > (1 + TOLERANCE) * before:
            lines.append(f"{case}: {now} instructions, {now / before - 1:.1%} more than committed; mend it, or where it is meant: {RENEW}")
        elif now < (1 - TOLERANCE) * before:
            lines.append(f"{case}: {now} instructions, {1 - now / before:.1%} fewer than committed; hold the gain by {RENEW}")
    return lines


def table(committed: Mapping[str, int], counted: Mapping[str, int]) -> str:
    """Return a line per case: its instructions and their change."""
    width = max(map(len, counted))
    return "\n".join(f"{case:{width}}  {n:12,}  {_change(committed.get(case), n):>7}" for case, n in counted.items())


def _change(before: int | None, now: int) -> str:
    return "new" if before is None else f"{now / before - 1:+.1%}"


if __name__ == "__main__":
    sys.exit(main())
