"""Rollouts of a policy in the simulator whose gradient is the world model's (DMO), for the actor and critic of ``actor_critic``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcfast.data.replay_shard import Episode
from ttcfast.esnr.ratio import ESNR, esnr
from ttcfast.pwm.envs.pool import EnvPool
from ttcfast.pwm.envs.rollouts import checked
from ttcfast.runtime.errors import ArgumentError

from .actor_critic import ActorCritic, Imagined

logger = logging.getLogger(__name__)


class SimulatedEpisodes:
    """Parallel episodes that a policy with noise plays on and on, H steps of each per update of the policy.

    A rollout's values are the simulator's: its latents are encodings of what was observed, its rewards were earned. The gradient of every
    step with respect to its latent and action is that of the model's ``next`` and ``reward`` there: ``real + model - model.detach()``. An
    exact model thus gives the gradient of what happened, and a wrong one a wrong gradient along a true trajectory.

    A rollout ends early where its episode is over: after its last step with the critic's value of the state then, but where the episode has
    ended on its own (``Environment``) with nothing more, to earn or to pass gradients. One in which the simulator fails is dropped and
    counted. The next update starts another episode there. The first episodes are cut at steps spread over their length, lest all be at the
    same step for ever.

    An episode is its random seed and its actions, and so the state of a run holds these: a resumed run plays them again and goes on with
    the same bits. No simulator needs to hand out its state for this, which in MuJoCo has hidden parts and in gymnasium is not asked for.

    Args:
        pool: B equal environments, which nothing else uses.
        policy: Actor and critic, with the world model whose gradients are taken.
        first_seed: Random seed of the first episode; later ones count on from it.
        keep: Whether to keep rollouts for :meth:`take`.

    Attributes:
        steps: Agent steps that the policy has made.
        failed: Number of rollouts in which the simulator failed.
        esnr: ESNR of the actor's gradient over the last rollouts; None if it was not measured.

    Raises:
        ArgumentError: H exceeds the steps of an episode.

    Source: after the idea of DMO, arXiv:2509.00215.
    """

    def __init__(self, pool: EnvPool, policy: ActorCritic, *, first_seed: int, keep: bool) -> None:
        if policy.config.horizon > pool.episode_length:
            steps = f"an episode of {pool.names[0]} has {pool.episode_length} steps"
            raise ArgumentError(f"agent.horizon is {policy.config.horizon}; {steps}: give at most that")
        self.pool, self.policy, self.keep, count = pool, policy, keep, len(pool)
        self.steps = self.failed = self._started = 0
        self.esnr: ESNR | None = None
        self._first_seed = first_seed
        self._seeds, self._done = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self._limits = np.zeros(count, dtype=np.int64)  # steps of every row's episode, 0 where none is going on
        self._actions = np.zeros((pool.episode_length, count, pool.action_dim), dtype=np.float32)
        self._obs = np.zeros((count, pool.observation_dim), dtype=np.float32)
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # obs [n, H + 1, O], act [n, H, A], rew [n, H]

    def starts(self) -> Tensor:
        """Start an episode in every row where none is going on, and return the latents ``[B, latent_dim]`` of all rows."""
        rows = np.flatnonzero(self._limits == 0)
        if len(rows):
            length, count = self.pool.episode_length, len(self.pool)
            self._limits[rows] = length if self._started else np.maximum(np.arange(1, count + 1) * length // count, 1)
            self._seeds[rows] = self._first_seed + self._started + np.arange(len(rows))
            self._started += len(rows)
            self._done[rows] = 0
            self._obs[rows] = self.pool.reset(self._seeds[rows].tolist(), at=rows.tolist())
            self._drop(list(self.pool.failures))
        return self._encoded()

    def rollout(self, z: Tensor, noise: Tensor, microbatches: int = 0) -> Imagined:
        """Play H steps from where :meth:`starts` says, with standard normal ``noise [H, B, action_dim]``, and return the rollouts.

        Args:
            z: Latents from :meth:`starts`.
            noise: Noise of the policy.
            microbatches: Number of groups of rollouts over which :attr:`esnr` is measured, by a further backward pass each; 0 for none.

        Raises:
            ArgumentError: The policy's actions are not finite.
            WorkerError: A worker of the pool ended.
        """
        model, config, task = self.policy.model, self.policy.config, self.policy.task
        latents, actions, observed, given = [z], [], [self._obs.copy()], []
        earned, discounts, own = [], [], []
        intact, whole, ended = self._limits > 0, self._limits > 0, np.zeros(len(z), dtype=bool)
        for t, eps in enumerate(noise):
            at = latents[-1]
            actions.append(self.policy.actor(at.detach() if config.detach else at, eps))
            given.append(checked(model.masked(actions[-1].detach(), task), len(z), self.pool.action_dim, t))
            going = self._limits > 0
            self.steps += int((going & ~ended).sum())
            rewards = self._step(given[-1], np.flatnonzero(going))
            intact[list(self.pool.failures)] = False
            made = going & intact & ~ended
            ends = np.isin(np.arange(len(z)), list(self.pool.terminated)) & made
            whole &= going
            ended |= ends
            own.append(torch.from_numpy(made))
            earned.append(torch.from_numpy(rewards))
            discounts.append(torch.from_numpy(np.where(made, np.where(ends, 0.0, config.gamma), 1.0)))
            predicted = model.next(at, actions[-1], task)
            real = self._encoded() + (predicted - predicted.detach())
            latents.append(torch.where(own[-1].to(z.device).unsqueeze(-1), real, at))
            observed.append(self._obs.copy())
        self._limits[ended] = 0
        if self.keep:
            self._keep(whole & intact, observed, given, earned)
        states, acted, mine = torch.stack(latents), torch.stack(actions), torch.stack(own).to(z.device)
        predicted = model.decode_reward(model.reward(states[:-1], acted, task)).squeeze(-1)
        real = torch.stack(earned).to(predicted) + (predicted - predicted.detach())
        found = Imagined(states, acted, torch.where(mine, real, 0.0), torch.stack(discounts).to(predicted), mine)
        if not intact.all():
            found = _picked(found, torch.from_numpy(np.flatnonzero(intact)))
        self.esnr = self._measured(found, microbatches) if microbatches else None
        return found

    def take(self) -> list[Episode]:
        """Return the rollouts kept since the last call, as episodes of H steps; those cut by the end of their episode are not kept."""
        kept, self._kept = self._kept, []
        return [Episode(obs, act, rew) for held in kept for obs, act, rew in zip(*held)]

    def state_dict(self) -> dict[str, Any]:
        """Return seeds and actions of the episodes, what was kept, and counts, for an exact resume."""
        longest = int(self._done[self._limits > 0].max(initial=0))
        arrays = {"seeds": self._seeds, "done": self._done, "limits": self._limits, "obs": self._obs, "actions": self._actions[:longest]}
        return {
            **{name: torch.tensor(array) for name, array in arrays.items()},
            "kept": [torch.cat(held) for held in zip(*self._kept)],
            "counts": [self._started, self.steps, self.failed],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, having played the episodes to where they were."""
        self._started, self.steps, self.failed = map(int, state["counts"])
        for array, name in ((self._seeds, "seeds"), (self._done, "done"), (self._limits, "limits")):
            array[:] = state[name].numpy()
        self._actions[: len(state["actions"])] = state["actions"].numpy()
        self._kept = [(state["kept"][0], state["kept"][1], state["kept"][2])] if state["kept"] else []
        self._obs[:] = state["obs"].numpy()
        rows = np.flatnonzero(self._limits > 0)
        if not len(rows):
            return
        found = self._obs.copy()
        found[rows] = self.pool.reset(self._seeds[rows].tolist(), at=rows.tolist())
        for t in range(len(state["actions"])):
            behind = rows[self._done[rows] > t]
            found[behind] = self.pool.step(self._actions[t, behind], at=behind.tolist())[0]
        if not np.array_equal(found, self._obs):
            logger.warning("%s does not repeat its episodes, so that this resume does not continue the same run", self.pool.names[0])
            self._obs[:] = np.where(np.isfinite(found), found, self._obs)

    def _step(self, actions: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Step the episodes of ``rows`` and return the rewards of all, 0 for others; ``_limits`` becomes 0 where one is over."""
        rewards = np.zeros(len(actions), dtype=np.float32)
        if not len(rows):
            self.pool.failures, self.pool.terminated = {}, set()
            return rewards
        observations, found, over = self.pool.step(actions[rows], at=rows.tolist())
        good = ~np.isin(rows, list(self.pool.failures))
        done = rows[good]
        self._obs[done], rewards[done] = observations[good], found[good]
        self._actions[self._done[done], done] = actions[done]
        self._done[done] += 1
        self._limits[done[over[good] | (self._done[done] >= self._limits[done])]] = 0
        self._drop(list(self.pool.failures))
        return rewards

    def _drop(self, rows: list[int]) -> None:
        """Give up the episodes of ``rows``, whose simulators failed."""
        self._limits[rows] = 0
        self._obs[rows] = 0.0
        self.failed += len(rows)

    def _encoded(self) -> Tensor:
        """Return the latents of the last observations, ``[B, latent_dim]``."""
        like = self.policy.actor.log_std
        with torch.no_grad():
            return self.policy.model.encode(torch.tensor(self._obs, device=like.device), self.policy.task)

    def _keep(self, rows: NDArray[np.bool_], obs: list[Any], act: list[Any], rew: list[Tensor]) -> None:
        if rows.any():
            held = (torch.from_numpy(np.stack(obs, 1)[rows]), torch.from_numpy(np.stack(act, 1)[rows]))
            self._kept.append((*held, torch.stack(rew, 1)[torch.from_numpy(rows)]))

    def _measured(self, rollout: Imagined, microbatches: int) -> ESNR | None:
        count = rollout.rewards.shape[1]
        if count < microbatches:
            return None
        parts = torch.arange(count).tensor_split(microbatches)
        losses = (self.policy.actor_loss(_picked(rollout, part)) for part in parts)
        of = list(self.policy.actor.parameters())
        return esnr([torch.autograd.grad(loss, of, retain_graph=True) for loss in losses], microbatch_size=count // microbatches)


def _picked(rollout: Imagined, rows: Tensor) -> Imagined:
    """Return some of the rollouts."""
    return rollout.each(lambda x: x[:, rows.to(x.device)])
