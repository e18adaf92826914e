"""What an evaluation measures of a world model along an episode that the policy has played."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ttcfast.data.episodes import Episode
from ttcfast.pwm.algorithms.pwm import PWM
from ttcfast.pwm.envs.base import Settable
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.spec import Key

from .gradients import sensitivity, simulator_cosine


def along_episode(agent: PWM, env: Settable | None, episode: Episode, *, seed: int, states: int, key: Key) -> dict[str, float]:
    """Return ``dynamics_lipschitz``, ``reward_lipschitz``, ``action_sensitivity`` and ``simulator_cosine`` of ``Evaluation``.

    Args:
        agent: World model and policy.
        env: Environment of its task without padding; None leaves out ``simulator_cosine``.
        episode: Episode of the policy.
        seed: Random seed of the episode.
        states: Number of states, evenly spaced over the episode.
        key: Key of the directions of ``simulator_cosine``.
    """
    assert agent.policy is not None
    horizon = min(agent.policy.config.horizon, len(episode.act))
    places = torch.linspace(0, len(episode.act) - horizon, states).long().unique().tolist()
    device = next(agent.model.parameters()).device
    task = agent.policy.task
    z = agent.model.encode(episode.obs[places].to(device), task)
    local = sensitivity(agent.model, z, episode.act[places].to(device), task)
    found = {"dynamics_lipschitz": local.dynamics[1], "reward_lipschitz": local.reward[1], "action_sensitivity": local.action[0]}
    if env is not None:
        gamma = agent.policy.config.gamma
        found["simulator_cosine"] = simulator_cosine(agent, env, episode, places, seed=seed, horizon=horizon, gamma=gamma, key=key)
    return found


def saturation(model: BaseWorldModel, episodes: Sequence[Episode], task: Task | None = None) -> float:
    """Return the share of the episodes' actions beyond 0.98, leaving out those that the task does not have."""
    device = next(model.parameters()).device
    has = model.masked(torch.ones(model.action_dim, device=device), task).bool().cpu()
    return float((torch.cat([episode.act for episode in episodes])[:, has].abs() > 0.98).double().mean())
