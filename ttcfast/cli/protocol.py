"""``ttcfast protocol``: policies inside MLP, residual and flow world models on several tasks, with the plan's verdict (resumable)

Example: ``ttcfast protocol data=[data/cartpole80] out=runs/protocol``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.experiments.protocol import write_protocol
from ttcfast.pwm.protocol import ProtocolConfig, protocol
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(ProtocolConfig, keys={"data": "data"}, places=("data",))


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):  # not while it trains: processes with other arms work beside it, and each run has its own lock
        save(config.out, values, "protocol")
    results = protocol(config)
    with run_lock(config.out):
        write_protocol(config, results)
    print(f"Table: {config.out}/table.csv, {config.out}/table.md. Figures: {config.out}/figures. Page: ttcfast report {config.out}")


if __name__ == "__main__":
    sys.exit(main(["protocol", *sys.argv[1:]]))
