"""``ttcfast run_ttc``: roll a surrogate out with and without test-time compute, and compare the methods"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.runtime.locks import run_lock

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
    "prm": "reward.prm_ckpt",
    "reward": "reward.type",
    "resume": "run.resume",
} | {
    name: f"eval.{name}"
    for name in (
        *("horizons", "oracle", "projection", "sweep", "sweep_problems", "sweep_methods", "sweep_projection", "shown", "recorded"),
        *("one_step", "methods", "merge", "calibration", "frontier", "frontier_problems", "search_candidates", "search_projected"),
    )
}


def run(values: Mapping[str, Any]) -> None:
    from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
    from ttcfast.runtime import distributed
    from ttcfast.runtime.distributed import process_group

    data, evaluation = dict(values["data"]), dict(values["eval"])
    arm, root = dict(values["arm"]), data.pop("root")
    config = build(
        RunTTCConfig,
        {
            "checkpoint": values["fm"]["ckpt"],
            "finetuned": values["fm"]["finetuned"],
            "data": [str(place) for place in (root if isinstance(root, list) else [root])],
            "problems": data.pop("n"),
            "split": data.pop("split"),
            "reading": data,
            "steps": evaluation.pop("rollout_T"),
            "momentum": arm.pop("momentum"),
            "scale": arm.pop("scale"),
            "arm": arm,
            "prm": values["reward"]["prm_ckpt"],
            "reward": values["reward"]["type"],
            "ttc": {**values["ttc"], "use_prm": values["reward"]["prm_ckpt"] is not None},
            "resume": values["run"]["resume"],
            **evaluation,
            **{key: values[key] for key in ("out", "device", "tensorboard", "wandb")},
        },
        names=_NAMES,
    )
    with run_lock(config.out), process_group("gloo" if config.device == "cpu" else None):
        if distributed.rank() > 0:  # all ranks have the same results; the first one's are the run's
            config = dataclasses.replace(config, out=f"{config.out}/rank{distributed.rank()}")
        save(config.out, values, "run_ttc")
        result = run_ttc(config, quiet=distributed.rank() > 0)
        if distributed.rank() == 0:
            print(f"Numbers: {config.out}/metrics.json, {config.out}/summary.csv. Figures:")
            for path in result.figures:
                print(f"  {path}")


if __name__ == "__main__":
    sys.exit(main(["run_ttc", *sys.argv[1:]]))
