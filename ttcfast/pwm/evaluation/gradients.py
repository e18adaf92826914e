"""How sensitive a world model is, and how its gradients compare with the simulator's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.pwm.algorithms.pwm import PWM
from ttcfast.pwm.envs.dm_control import DMControlEnv
from ttcfast.pwm.models.base import BaseWorldModel, Task


@dataclass(frozen=True)
class Sensitivity:
    """Local Lipschitz constants of a world model at some states, each the mean and the largest over the states.

    Attributes:
        dynamics: Largest singular value of the Jacobian of the next latent with respect to the latent.
        action: That with respect to the action.
        reward: Norm of the gradient of the reward with respect to the latent.
    """

    dynamics: tuple[float, float]
    action: tuple[float, float]
    reward: tuple[float, float]


def sensitivity(model: BaseWorldModel, z: Tensor, a: Tensor, task: Task | None = None) -> Sensitivity:
    """Return the sensitivity of ``model`` at latents ``z [B, latent_dim]`` and actions ``a [B, action_dim]``."""
    z, a = z.detach().requires_grad_(True), a.detach().requires_grad_(True)
    with model.frozen():
        following = model.next(z, a, task)
        # Rows of a batch do not touch each other, so that one backward pass gives a row of every state's Jacobian.
        rows = [torch.autograd.grad(following[:, i].sum(), (z, a), retain_graph=True) for i in range(following.shape[1])]
        (reward,) = torch.autograd.grad(model.decode_reward(model.reward(z, a, task)).sum(), z)
    by_state, by_action = (torch.stack([row[k] for row in rows], 1) for k in (0, 1))
    return Sensitivity(
        _spread(torch.linalg.matrix_norm(by_state, 2)), _spread(torch.linalg.matrix_norm(by_action, 2)), _spread(reward.norm(dim=1))
    )


def model_gradient(agent: PWM, obs: Tensor, actions: Tensor, gamma: float) -> Tensor:
    """Return the gradient ``[H, A]`` of the imagined discounted return of ``actions [H, A]`` from the observation ``obs [O]``."""
    given = actions.detach().clone().requires_grad_(True)
    with agent.model.frozen():
        latents = agent.rollout(agent.model.encode(obs[None]), given.unsqueeze(1))
        rewards = agent.model.decode_reward(agent.model.reward(latents[:-1], given.unsqueeze(1)))
        total = (gamma ** torch.arange(len(given), dtype=rewards.dtype) * rewards.flatten()).sum()
    return torch.autograd.grad(total, given)[0]


def simulator_gradient(env: DMControlEnv, state: Tensor, actions: Tensor, gamma: float, *, size: float = 1e-3) -> Tensor:
    """Return the same gradient by central differences through the simulator from ``state [nq + nv]``; ends the current episode.

    Actions are kept ``size`` away from the ends of their range.
    """
    base = actions.double().clamp(-1 + size, 1 - size)
    found = torch.zeros_like(base)
    for place in range(base.numel()):
        ends = []
        for side in (size, -size):
            moved = base.flatten().clone()
            moved[place] += side
            env.reset(0)
            env.set_state(state.numpy())
            rewards = [env.step(a.numpy())[1] for a in moved.view_as(base)]
            ends.append(sum(gamma**t * reward for t, reward in enumerate(rewards)))
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * size)
    return found


def beside_simulator(agent: PWM, env: DMControlEnv, *, seed: int, horizon: int = 16, every: int = 50) -> tuple[Tensor, Tensor]:
    """Return the gradients of world model and simulator, ``[n, H, A]`` float64 each, at every ``every``-th step of an episode.

    Both are gradients of the discounted return of the next ``horizon`` actions of the mean policy with respect to these actions, as
    numbers that do not depend on the state.

    Args:
        agent: World model and policy.
        env: Environment of its task.
        seed: Random seed of the episode.
        horizon: H, steps of the return.
        every: Steps between the states.
    """
    obs, over = torch.from_numpy(env.reset(seed)), False
    states, seen, acted = [], [], []
    while not over:
        states.append(torch.from_numpy(env.state()))
        seen.append(obs)
        acted.append(agent.act(obs[None])[0])
        observation, _, over = env.step(acted[-1].numpy())
        obs = torch.from_numpy(observation)
    actions, gamma, found = torch.stack(acted), agent.gamma, []
    for t in range(0, len(actions) - horizon + 1, every):
        ours = model_gradient(agent, seen[t], actions[t : t + horizon], gamma).double()
        theirs = simulator_gradient(env, states[t], actions[t : t + horizon], gamma)
        found.append(torch.stack([ours, theirs]))
    ours, theirs = torch.stack(found, 1)
    return ours, theirs


def _spread(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.max())
