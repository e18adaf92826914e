"""``ttcfast run_ttc``: roll a surrogate out with and without test-time compute, and compare the methods"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.errors import ArgumentError

from .configuration import build, save
from .main import main

# Fields of RunTTCConfig by the keys that the user writes.
_NAMES = {
    "checkpoint": "fm.ckpt",
    "finetuned": "fm.finetuned",
    "problems": "data.n",
    "split": "data.split",
    "reading": "data",
    "steps": "eval.rollout_T",
} | {
    name: f"eval.{name}"
    for name in ("horizons", "oracle", "projection", "sweep", "sweep_problems", "sweep_projection", "shown", "recorded", "one_step")
}


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.report.run_ttc import RunTTCConfig, run_ttc

    check_reward(values["reward"])
    data, evaluation = dict(values["data"]), dict(values["eval"])
    arm = dict(values["arm"])
    config = build(
        RunTTCConfig,
        {
            "checkpoint": values["fm"]["ckpt"],
            "finetuned": values["fm"]["finetuned"],
            "data": [str(data.pop("root"))],
            "problems": data.pop("n"),
            "split": data.pop("split"),
            "reading": data,
            "steps": evaluation.pop("rollout_T"),
            "momentum": arm.pop("momentum"),
            "scale": arm.pop("scale"),
            "arm": arm,
            "ttc": {**values["ttc"], "use_prm": False},
            **evaluation,
            **{key: values[key] for key in ("out", "device", "tensorboard", "wandb")},
        },
        names=_NAMES,
    )
    save(config.out, values, "run_ttc")
    result = run_ttc(config)
    print(f"Numbers: {config.out}/metrics.json, {config.out}/summary.csv. Figures:")
    for path in result.figures:
        print(f"  {path}")


def check_reward(reward: Mapping[str, Any]) -> None:
    """Refuse the learned reward, which the seed's command line may ask for."""
    if reward["type"] not in ("arm", "prm"):
        raise ArgumentError(f"reward.type is {reward['type']!r}; it must be arm")
    if reward["type"] == "prm" or reward["prm_ckpt"] is not None:
        raise ArgumentError(
            "use_prm=true (reward.type=prm, prm.ckpt) asks for a learned reward, which this version does not have; give use_prm=false"
        )


if __name__ == "__main__":
    sys.exit(main(["run_ttc", *sys.argv[1:]]))
