"""Plans around, and without, the policy of an agent: ``planning.py [agent.safetensors [task [episodes]]]``.

Prints the returns of three episodes, or as many as given, and their mean, the steps of the world model and the milliseconds per
action: the tables of docs/agents.md.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ttcfast
from ttcfast.pwm.envs import EnvPool, make_env
from ttcfast.pwm.evaluation.play import play

FIRST, EPISODES = 12000, 3  # random seed of the first
PLANS: dict[str, tuple[dict[str, Any] | None, bool]] = {  # settings of the planner, and whether policy and critic take part
    "policy": (None, True),
    "beam search around it": ({"method": "beam", "horizon": 8, "samples": 16, "width": 8}, True),
    "MPPI around it": ({"horizon": 16, "samples": 64, "iterations": 3}, True),
    "MPPI without it": ({"horizon": 50, "samples": 192, "iterations": 3, "std_max": 1.0}, False),
}


def main(path: Path, task: str, episodes: int) -> None:
    torch.set_num_threads(1)
    agent, seeds = ttcfast.load(path), range(FIRST, FIRST + episodes)
    with EnvPool([partial(make_env, task)] * episodes) as pool:
        for name, (planning, warm) in PLANS.items():
            found = play(agent, pool, seeds, planning, warm=warm)
            returns = ", ".join(f"{value:.0f}" for value in found.rollouts.returns.tolist())
            print(f"{name}: return {found.mean:.1f} ({returns}), {found.evaluations:.0f} steps, {1e3 * found.seconds:.1f} ms", flush=True)


if __name__ == "__main__":
    given = [Path(__file__).with_name("agent.safetensors"), "cartpole-swingup", EPISODES]
    given[: len(sys.argv) - 1] = sys.argv[1:]
    main(Path(given[0]), str(given[1]), int(given[2]))
