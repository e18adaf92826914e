"""``ttcfast report``: the numbers of several runs of demo and run_ttc in one table"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .configuration import build, save
from .main import main


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.report.compare import CompareConfig, compare

    config = build(CompareConfig, values)
    save(config.out, values, "report")
    compare(config)
    print(f"Table: {config.out}/report.csv, {config.out}/report.md")


if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
