"""``ttcfast bench``: time an operation against its peers (from a checkout)

Example: ``ttcfast bench op=topk``
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttcfast.runtime.errors import ArgumentError, UserError

from .layout import Layout
from .main import main

LAYOUT = Layout()  # configs/bench.yaml holds its keys
ROOT = Path(__file__).resolve().parents[2]


def run(values: Mapping[str, Any]) -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
    if not known:
        raise ArgumentError(f"there is no bench folder beside the package ({ROOT}); run from a checkout of ttcfast")
    if values["op"] not in (*known, "all"):
        raise ArgumentError(f"op is {values['op']!r}; it must be one of {', '.join(known)}, all")
    # In a process of its own: it sets thread counts, and bench/ is importable from the checkout alone.
    command = [sys.executable, "-m", "bench", values["op"], *shlex.split(str(values["args"]))]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        raise UserError(f"{' '.join(command[1:])} ended with status {status}; its own message stands above")


if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
