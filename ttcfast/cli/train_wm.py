"""``ttcfast train_wm``: train MLP, residual and flow world models on replay data and compare them on held-out episodes (resumable)

Example: ``ttcfast train_wm data=data/cartpole80 arms=[mlp,heun2]``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.experiments.world_models import run_train_wm
from ttcfast.pwm.train_wm import TrainWMConfig
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(TrainWMConfig)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        save(config.out, values, "train_wm")
        run_train_wm(config)
    print(f"Table: {config.out}/table.csv, {config.out}/table.md. Figure: {config.out}/endpoint_error.png")


if __name__ == "__main__":
    sys.exit(main(["train_wm", *sys.argv[1:]]))
