"""Episodes that a policy plays in a pool of environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ttcfast.data.replay_shard import Episode
from ttcfast.runtime.errors import ArgumentError

from .pool import EnvPool

Policy = Callable[[Tensor, int, Tensor], Tensor]
"""``policy(obs [n, O] float32, step, episodes [n] int64) -> actions [n, A]`` in [-1, 1]."""


@dataclass(frozen=True)
class Rollouts:
    """Episodes in the order of their seeds.

    Attributes:
        episodes: The episodes; None where the simulator failed.
        returns: Sums of rewards ``[n]`` float64; NaN where it failed.
        failures: What happened, by the number of the failed episode.
    """

    episodes: list[Episode | None]
    returns: Tensor
    failures: dict[int, str]

    @property
    def failed(self) -> int:
        """Number of failed episodes."""
        return len(self.failures)

    def kept(self) -> list[Episode]:
        """Return the episodes that did not fail."""
        return [episode for episode in self.episodes if episode is not None]


def rollouts(pool: EnvPool, policy: Policy, seeds: Sequence[int], *, task: int = 0) -> Rollouts:
    """Play one episode per seed, as many at a time as the pool has environments.

    Episode ``i`` starts from ``seeds[i]`` in environment ``i % len(pool)``. It depends on its seed and the policy alone, so that a policy
    whose actions depend only on each row's observation, step and episode number gives the same episodes for any pool and any number of
    processes; a network's sums may be rounded differently for other numbers of rows. An episode in which the simulator raises or returns
    something that is not finite is dropped whole, and the others go on.

    Args:
        pool: The environments; equal ones unless each seed is meant for its own.
        policy: ``policy(obs [n, O] float32, step, episodes [n]) -> actions [n, A]`` in [-1, 1] for the n episodes that are going on, called
            without gradients; ``step`` counts from 0 and ``episodes`` are their numbers, for instance to key noise by.
        seeds: Random seed of each episode.
        task: Number of the task, kept in the episodes.

    Raises:
        ArgumentError: No seed, or the policy's actions have another shape, lie outside [-1, 1] or are not finite.
        WorkerError: A worker of the pool ended.
    """
    if not len(seeds):
        raise ArgumentError("seeds is empty; give one per episode")
    episodes: list[Episode | None] = []
    failures: dict[int, str] = {}
    for first in range(0, len(seeds), len(pool)):
        played = _play(pool, policy, [int(seed) for seed in seeds[first : first + len(pool)]], first)
        episodes += [record.episode(task) if record.failure is None else None for record in played]
        failures |= {first + i: record.failure for i, record in enumerate(played) if record.failure is not None}
    returns = [float("nan") if episode is None else float(episode.rew.double().sum()) for episode in episodes]
    return Rollouts(episodes, torch.tensor(returns, dtype=torch.float64), failures)


@dataclass
class _Record:
    """What happened so far in one episode."""

    observations: list[NDArray[np.float32]] = field(default_factory=list)
    actions: list[NDArray[np.float32]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    failure: str | None = None

    def episode(self, task: int) -> Episode:
        obs, act = torch.from_numpy(np.stack(self.observations)), torch.from_numpy(np.stack(self.actions))
        return Episode(obs, act, torch.tensor(self.rewards, dtype=torch.float32), task)


def _play(pool: EnvPool, policy: Policy, seeds: list[int], first: int) -> list[_Record]:
    """Play one episode in each of the first ``len(seeds)`` environments; ``first`` is the number of the first one."""
    records = [_Record() for _ in seeds]
    observations = pool.reset(seeds, at=range(len(seeds)))
    for record, observation in zip(records, observations, strict=True):
        record.observations.append(observation)
    playing = _without_failures(pool, records, range(len(seeds)), "at the reset")
    for step in range(pool.episode_length):
        if not playing:
            break
        shown = torch.from_numpy(np.stack([records[i].observations[-1] for i in playing]))
        with torch.no_grad():
            chosen = policy(shown, step, torch.tensor([first + i for i in playing]))
        actions = checked(chosen, len(playing), pool.action_dim, step)
        observations, rewards, over = pool.step(actions, at=playing)
        going = _without_failures(pool, records, playing, f"at step {step}")
        for row, i in enumerate(playing):
            records[i].observations.append(observations[row])
            records[i].actions.append(actions[row])
            records[i].rewards.append(float(rewards[row]))
        ended = {i for row, i in enumerate(playing) if over[row]}
        playing = [i for i in going if i not in ended]
    for i in playing:
        records[i].failure = f"{pool.names[i]} did not end after {pool.episode_length} steps"
    return records


def _without_failures(pool: EnvPool, records: list[_Record], playing: Sequence[int], when: str) -> list[int]:
    for i, failure in pool.failures.items():
        records[i].failure = f"{failure}, {when}"
    return [i for i in playing if i not in pool.failures]


def checked(actions: Tensor, count: int, size: int, step: int) -> NDArray[np.float32]:
    """Return a policy's actions ``[count, size]`` of a step as an array, or raise ``ArgumentError`` unless they lie in [-1, 1]."""
    given = torch.as_tensor(actions).detach().to("cpu", torch.float32)
    if given.shape != (count, size):
        raise ArgumentError(f"the policy's actions have shape {tuple(given.shape)} at step {step}; expected ({count}, {size})")
    if not bool((given.abs() <= 1).all()):
        row = int((~(given.abs() <= 1).all(1)).nonzero()[0])
        raise ArgumentError(
            f"the policy's action is {given[row].tolist()} at step {step}; every entry must lie in [-1, 1]: end it in tanh or clip it"
        )
    return np.array(given.numpy())  # a policy may write its next actions into the same memory
