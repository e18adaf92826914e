"""``ttcfast train_prm_on_policy``: train a dense reward model along the rollouts it corrects (resumes where a killed run stopped)

Example: ``ttcfast train_prm_on_policy fm.ckpt=examples/surrogate.safetensors data=data/euler64``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.training.on_policy import OnPolicyConfig, train_on_policy
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import INSTEAD, Layout, plain_defaults
from .main import main

# residual: features of the Euler equations beside the states, which the training makes from the data's step and cell.
_MODEL = {**plain_defaults(DensePRM, "width", "depth", "levels", "patch"), "residual": True}
LAYOUT = Layout(
    OnPolicyConfig,
    keys={"fm": "fm.ckpt", "factory": "fm.factory", "args": "fm.args"},
    groups={"model": _MODEL},
    free=("fm.args",),
    instead=INSTEAD,
    aliases={"fm": "fm.ckpt", "data.": "reading."},
)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        save(config.out, values, "train_prm_on_policy")
        folder, validation = train_on_policy(config)
    print(f"reward model: {folder}")
    print("validation, errors over those of the deterministic step: " + ", ".join(f"{n} {v:.3f}" for n, v in validation.items()))


if __name__ == "__main__":
    sys.exit(main(["train_prm_on_policy", *sys.argv[1:]]))
