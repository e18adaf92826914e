"""``ttcfast report``: runs on one HTML page (tables, charts, animation, calibration, provenance), and their numbers in one table

Example: ``ttcfast report runs/demo``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.report.compare import PAGE, CompareConfig, compare
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(CompareConfig, words="runs")


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        save(config.out, values, "report")
        rows = compare(config)
    print(f"Page: {config.out}/{PAGE}" + (f". Table: {config.out}/report.csv, {config.out}/report.md" if rows else ""))


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
