"""Plays a trained agent in its environment, by its policy or by planning with its world model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttcfast.pwm.algorithms.pwm import PWM
from ttcfast.pwm.envs.pool import EnvPool
from ttcfast.pwm.envs.rollouts import Rollouts, rollouts
from ttcfast.pwm.planning import Planner


@dataclass(frozen=True)
class Played:
    """Episodes, and the cost of their actions.

    Attributes:
        rollouts: Episodes, returns and failures.
        seconds: Seconds per action of one environment, of policy or planner, without the simulator.
        evaluations: Steps of the world model per action.
    """

    rollouts: Rollouts
    seconds: float
    evaluations: float

    @property
    def mean(self) -> float:
        """Mean return of the episodes that did not fail."""
        return float(self.rollouts.returns.nanmean())


def play(agent: PWM, pool: EnvPool, seeds: Sequence[int], planning: dict[str, Any] | None = None, *, warm: bool = True) -> Played:
    """Play one episode per random seed.

    Args:
        agent: World model and, unless planning goes without it, policy.
        pool: Environments of the agent's task.
        seeds: Random seed of each episode.
        planning: Arguments of :class:`ttcfast.pwm.planning.Planner`, ``horizon`` and ``samples`` among them; None for the mean policy.
        warm: Whether the planner takes the policy's actions among its candidates and the critic's value at the end; without, it has the
            world model alone.

    Raises:
        ArgumentError: A setting of the planner is out of range.
        ValueError: There is no policy, and it is needed.
    """
    device = next(agent.model.parameters()).device
    policy = agent.policy
    task = None if policy is None else policy.task
    planner = None
    if planning is not None:
        given: dict[str, Any] = {}
        if warm:
            if policy is None:
                raise ValueError("agent has no policy; give warm=False to plan without one")
            given = {"policy": policy.act, "value": policy.value}
        if task is not None:
            given["task"] = task
        planner = Planner(agent.model, **{**given, **planning})
    spent, actions = 0.0, 0

    def choose(obs: Tensor, step: int, episodes: Tensor) -> Tensor:
        nonlocal spent, actions
        started = time.perf_counter()
        if planner is None:
            chosen = agent.act(obs.to(device)).cpu()
        else:
            if step == 0 or planner.n != len(obs):
                planner.reset(len(obs))
            chosen = planner.act(agent.model.encode(obs.to(device), task)).cpu()
        spent, actions = spent + time.perf_counter() - started, actions + len(obs)
        return chosen

    with torch.no_grad():
        found = rollouts(pool, choose, seeds)
    return Played(found, spent / max(actions, 1), 0.0 if planner is None else planner.evaluations / max(planner.actions, 1))
