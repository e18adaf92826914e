"""``ttcfast train_policy``: train a policy inside a world model, from recorded episodes or online (resumable)

Example: ``ttcfast train_policy data=data/cartpole80 arm=heun2 out=runs/agent``
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.pwm.policy_config import TrainPolicyConfig
from ttcfast.pwm.train_policy import train_policy
from ttcfast.runtime.locks import run_lock

from .configuration import save
from .layout import Layout
from .main import main

LAYOUT = Layout(TrainPolicyConfig)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build(values)
    with run_lock(config.out):
        save(config.out, values, "train_policy")
        found = train_policy(config)
    for evaluation in found.evaluations:
        print(
            f"  after {evaluation.step} updates: return {evaluation.mean:.0f}, predicted value {evaluation.predicted:.1f}, "
            f"realised {evaluation.realised:.1f}"
        )
    if found.failed:
        print(f"  {found.failed} episodes were dropped, in which the simulator failed")
    print(f"{found.task}, {found.arm}, seed {found.seed}: {config.out}/agent.safetensors, {config.out}/result.json")


if __name__ == "__main__":
    sys.exit(main(["train_policy", *sys.argv[1:]]))
