"""``ttcfast train_prm_on_policy``: train a dense reward model along the rollouts it corrects (resumes where a killed run stopped)"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.locks import run_lock

from .configuration import build, save
from .main import main


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.rewards.prm.training.on_policy import OnPolicyConfig, train_on_policy

    config = build(OnPolicyConfig, values, names={"reading": "data"})
    with run_lock(config.out):
        save(config.out, values, "train_prm_on_policy")
        folder, validation = train_on_policy(config)
    print(f"reward model: {folder}")
    print("validation, errors over those of the deterministic step: " + ", ".join(f"{n} {v:.3f}" for n, v in validation.items()))


if __name__ == "__main__":
    sys.exit(main(["train_prm_on_policy", *sys.argv[1:]]))
