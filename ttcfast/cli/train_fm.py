"""``ttcfast train_fm``: train the one-step surrogate (resumes where a killed run stopped)"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.locks import run_lock

from .configuration import build, save
from .main import main


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.models.train import TrainConfig, train

    config = build(TrainConfig, values, names={"reading": "data"})
    with run_lock(config.out):
        save(config.out, values, "train_fm")
        result = train(config)
    print(f"checkpoint after {result.steps} steps: {result.checkpoint}")
    print("validation: " + ", ".join(f"{name} {value:.4g}" for name, value in result.validation.items()))


if __name__ == "__main__":
    sys.exit(main(["train_fm", *sys.argv[1:]]))
