"""``ttcfast report``: runs on one HTML page (tables, charts, animation, calibration, provenance), and their numbers in one table"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.locks import run_lock

from .configuration import build, save
from .main import main


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.report.compare import PAGE, CompareConfig, compare

    config = build(CompareConfig, values)
    with run_lock(config.out):
        save(config.out, values, "report")
        rows = compare(config)
    print(f"Page: {config.out}/{PAGE}" + (f". Table: {config.out}/report.csv, {config.out}/report.md" if rows else ""))


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
