"""``ttcfast train_fm``: train the one-step surrogate (resumes where a killed run stopped)

Example: ``ttcfast train_fm data=data/euler64 model.width=96 max_seconds=3600 out=runs/train_fm``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.models.fno import FNOConfig
from ttcfast.models.train import TrainConfig, train
from ttcfast.models.vit import ViTConfig
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout, plain_defaults
from .main import main

_SIZES = ("patch", "width", "depth", "heads", "mlp_ratio", "dropout", "refine")  # channels, grid and periodicity are the data's
_FNO = ("width", "modes", "depth", "dropout", "waves")
_MODELS = {"model": plain_defaults(ViTConfig, *_SIZES), "fno": plain_defaults(FNOConfig, *_FNO)}
LAYOUT = Layout(TrainConfig, groups=_MODELS, aliases={"data.": "reading."})


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        save(config.out, values, "train_fm")
        result = train(config)
    print(f"checkpoint after {result.steps} steps: {result.checkpoint}")
    print("validation: " + ", ".join(f"{name} {value:.4g}" for name, value in result.validation.items()))


if __name__ == "__main__":
    sys.exit(main(["train_fm", *sys.argv[1:]]))
