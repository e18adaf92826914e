"""How sensitive a world model is, and how its gradients compare with the simulator's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ttcfast.data.episodes import Episode
from ttcfast.ops import normal
from ttcfast.pwm.algorithms.pwm import PWM
from ttcfast.pwm.envs.base import Environment, PaddedEnv, Settable
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.runtime.errors import UserError
from ttcfast.spec import Key


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
    return _model_gradients(agent, obs[None], actions.unsqueeze(1), gamma)[:, 0]


def simulator_gradient(env: Settable, state: Tensor, actions: Tensor, gamma: float, *, size: float = 1e-3, seed: int = 0) -> Tensor:
    """Return the same gradient by central differences through the simulator from ``state``; ends the current episode.

    Actions are kept ``size`` away from the ends of their range. ``seed`` is that of the state's episode, whose reset may draw a target.
    """
    base = actions.double().clamp(-1 + size, 1 - size)
    found = torch.zeros_like(base)
    for place in range(base.numel()):
        ends = []
        for side in (size, -size):
            moved = base.flatten().clone()
            moved[place] += side
            ends.append(_earned(env, state, moved.view_as(base), gamma, seed))
        found.view(-1)[place] = (ends[0] - ends[1]) / (2 * size)
    return found


def beside_simulator(agent: PWM, env: Settable, *, seed: int, horizon: int = 16, every: int = 50) -> tuple[Tensor, Tensor]:
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
        theirs = simulator_gradient(env, states[t], actions[t : t + horizon], gamma, seed=seed)
        found.append(torch.stack([ours, theirs]))
    ours, theirs = torch.stack(found, 1)
    return ours, theirs


def settable(env: Environment) -> Settable | None:
    """Return ``env`` without its padding if its simulator can be set into any state, else None."""
    inner = env.env if isinstance(env, PaddedEnv) else env
    return inner if isinstance(inner, Settable) else None


def simulator_cosine(
    agent: PWM,
    env: Settable,
    episode: Episode,
    places: Sequence[int],
    *,
    seed: int,
    horizon: int,
    gamma: float,
    key: Key,
    directions: int = 2,
    size: float = 1e-3,
) -> float:
    """Return the cosine of the world model's gradient with the simulator's over several states of an episode together.

    Compared are derivatives of the discounted return of the ``horizon`` actions that follow each state, along random unit directions of
    these actions; the simulator's are central differences, two rollouts per direction whatever the size of an action. NaN if either
    gradient is 0 or not finite everywhere, or the simulator fails.

    Args:
        agent: World model.
        env: Environment of its task, without padding; its current episode ends.
        episode: Episode of the environment, of at least ``horizon`` steps; padded where the model is.
        places: Steps of the states in the episode, ascending, the last at least ``horizon`` steps before its end.
        seed: Random seed of the episode.
        horizon: H, steps of the return.
        gamma: Discount of the return.
        key: Key of the directions.
        directions: Directions per state.
        size: Step of the differences, which stay as far from the ends of the actions' range.
    """
    act, lead = episode.act[:, : env.action_dim].double(), (len(places), directions)
    base = torch.stack([act[t : t + horizon] for t in places]).clamp(-1 + size, 1 - size)  # [S, H, A]
    rows = torch.cartesian_prod(torch.arange(lead[0]), torch.arange(lead[1]))
    along = normal(len(rows), tuple(base.shape[1:]), key=key, rows=rows).double()
    along = torch.nn.functional.normalize(along.flatten(1), dim=1).view(*lead, *base.shape[1:])  # [S, D, H, A]
    try:
        states = _states(env, act, places, seed)
        ends = [
            [_earned(env, state, around + side * size * u, gamma, seed) for state, around, us in zip(states, base, along) for u in us]
            for side in (1, -1)
        ]
    except (UserError, MemoryError):
        raise
    except Exception:  # a simulator may raise anything
        return math.nan
    theirs = (torch.tensor(ends[0], dtype=torch.float64) - torch.tensor(ends[1], dtype=torch.float64)) / (2 * size)
    given = pad(base.transpose(0, 1), (0, episode.act.shape[1] - base.shape[2])).to(episode.act.dtype)
    gradient = _model_gradients(agent, episode.obs[list(places)], given, gamma).transpose(0, 1)[..., : base.shape[2]].double()
    ours = (gradient.unsqueeze(1) * along).sum((2, 3)).flatten()
    found = float(ours @ theirs / (ours.norm() * theirs.norm()))
    return found if math.isfinite(found) else math.nan


def _model_gradients(agent: PWM, obs: Tensor, actions: Tensor, gamma: float) -> Tensor:
    """Return the gradients ``[H, S, A]`` of the imagined returns of ``actions [H, S, A]`` from ``obs [S, O]``, on the CPU."""
    device = next((p.device for p in agent.model.parameters()), torch.device("cpu"))
    given = actions.detach().to(device, copy=True).requires_grad_(True)
    with agent.model.frozen():
        task = None if agent.policy is None else agent.policy.task
        latents = agent.rollout(agent.model.encode(obs.to(device), task), given, task)
        rewards = agent.model.decode_reward(agent.model.reward(latents[:-1], given, task)).squeeze(-1)
        total = (gamma ** torch.arange(len(given), dtype=rewards.dtype, device=device) @ rewards).sum()
    return torch.autograd.grad(total, given)[0].cpu()


def _states(env: Settable, act: Tensor, places: Sequence[int], seed: int) -> list[Tensor]:
    """Play an episode again and return the simulator's states at ``places``."""
    env.reset(seed)
    found = []
    for t, a in enumerate(act[: places[-1] + 1].numpy()):
        if t in places:
            found.append(torch.from_numpy(env.state()))
        env.step(a)
    return found


def _earned(env: Settable, state: Tensor, actions: Tensor, gamma: float, seed: int) -> float:
    """Return the discounted return of ``actions [H, A]`` from a state of the episode of ``seed``."""
    env.reset(seed)
    env.set_state(state.numpy())
    return sum(gamma**t * env.step(a)[1] for t, a in enumerate(actions.numpy()))


def _spread(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.max())
