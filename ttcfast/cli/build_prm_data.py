"""``ttcfast build_prm_data``: rank candidates of the reward split, to train a reward model on (resumes where a killed run stopped)

Example: ``ttcfast build_prm_data fm.ckpt=examples/surrogate.safetensors out=runs/triplets``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttcfast.experiments.build_prm_data import BuildPRMDataConfig, build_prm_data
from ttcfast.rewards.prm.triplets.file import SUFFIXES, TripletFile
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import MODEL, Layout, with_noise
from .main import main

LAYOUT = Layout(
    BuildPRMDataConfig,
    keys={**MODEL, "data": "data.root", "trajectories": "data.n", "split": "data.train_split", "reading": "data"},
    free=("fm.args",),
    instead=with_noise("stochastic"),
    places=("data",),
)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out, file=Path(config.out).suffix.lower() in SUFFIXES):
        path = build_prm_data(config)
        save(Path(path).parent, values, f"{path.stem}.build_prm_data")
    made = TripletFile(path)
    print(f"{len(made)} triplets of {made.K} candidates each ({made.skipped} states left out): {path}")


if __name__ == "__main__":
    sys.exit(main(["build_prm_data", *sys.argv[1:]]))
