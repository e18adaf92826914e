"""``ttcfast run_ttc``: roll a surrogate out with and without test-time compute, and compare the methods

Example: ``ttcfast run_ttc fm.ckpt=examples/surrogate.safetensors data.root=examples data.split=null``
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
from ttcfast.runtime import distributed
from ttcfast.runtime.distributed import process_group
from ttcfast.runtime.locks import run_lock
from ttcfast.spec import StochasticConfig

from .configuration import save
from .layout import MODEL, Layout, plain_defaults, with_noise
from .main import main

_EVALUATION = (
    *("horizons", "oracle", "projection", "sweep", "sweep_problems", "sweep_methods", "sweep_projection", "shown", "recorded"),
    *("solvers", "breakeven", "one_step", "methods", "merge", "calibration"),
    *("frontier", "frontier_problems", "search_candidates", "search_projected"),
)
LAYOUT = Layout(
    RunTTCConfig,
    keys={
        **MODEL,
        "finetuned": "fm.finetuned",
        "data": "data.root",
        "problems": "data.n",
        "split": "data.split",
        "reading": "data",
        "steps": "eval.rollout_T",
        "momentum": "arm.momentum",
        "scale": "arm.scale",
        "prm": "reward.prm_ckpt",
        "reward": "reward.type",
        "resume": "run.resume",
    }
    | {name: f"eval.{name}" for name in _EVALUATION},
    groups={"fm.ckpt": None, "ttc.stochastic": plain_defaults(StochasticConfig)},
    free=("fm.args",),
    instead=with_noise("ttc.stochastic"),
    hidden=("ttc.use_prm", "ttc.ndim"),
    places=("data",),
    aliases={  # the plan's command line writes the left, its configuration the right
        "stochastic": "ttc.stochastic",
        "stochastic.": "ttc.stochastic.",
        "prm.ckpt": "reward.prm_ckpt",
        "use_prm": "reward.type",
        "finetuned.ckpt": "fm.finetuned",
    },
)


def run(values: Mapping[str, Any]) -> None:
    config = LAYOUT.build({**values, "ttc": {**values["ttc"], "use_prm": values["reward"]["prm_ckpt"] is not None}})
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
