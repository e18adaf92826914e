"""``ttcfast train_prm``: train a reward model on triplets (resumes where a killed run stopped)

Example: ``ttcfast train_prm data.root=runs/triplets fm.ckpt=examples/surrogate.safetensors``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.rewards.prm.train import TrainPRMConfig, train
from ttcfast.runtime.distributed import launched_rank
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(TrainPRMConfig)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    first = launched_rank() == 0
    with run_lock(config.out):
        if first:
            save(config.out, values, "train_prm")
        result = train(config)
    if first:
        print(f"reward model after {result.steps} steps: {result.folder}")
        print("validation: " + (", ".join(f"{name} {value:.4g}" for name, value in result.validation.items()) or "none"))


if __name__ == "__main__":
    sys.exit(main(["train_prm", *sys.argv[1:]]))
