"""Sets of episodes from replay shards: splits by episode, random windows for training drawn by (seed, step), statistics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import at_least, whole
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import entries
from ttcfast.transfer import sent

from .episodes import Episode, Shard
from .minari import minari_file, open_minari
from .replay_shard import ReplayShard
from .statistics import mean_std, moments


class Windows(NamedTuple):
    """B windows of H steps, time first, as ``PWM.compute_wm_loss`` expects: float32, ``task`` int64."""

    obs: Tensor  # [H+1, B, O]
    act: Tensor  # [H, B, A]
    rew: Tensor  # [H, B, 1]
    task: Tensor  # [B]

    def to(self, device: str | torch.device) -> Windows:
        return Windows(*(sent(values, torch.device(device)) for values in self))


class ReplaySet:
    """Episodes of shards with equal observation and action sizes, read lazily; instances can be pickled.

    Args:
        shards: At least one; each may have its own length of episodes.
        episodes: ``[N, 2]`` int64 pairs (shard, episode in the shard), in order; None takes all.

    Raises:
        DataError: No shard, shards of different sizes, or shards that number their tasks differently.
    """

    def __init__(self, shards: Sequence[Shard], episodes: Tensor | None = None) -> None:
        if not shards:
            raise DataError("no replay shard given; name at least one .pt file or a folder that holds some")
        self.shards = tuple(shards)
        self.observation_dim, self.action_dim = shards[0].observation_dim, shards[0].action_dim
        for shard in shards:
            found, wanted = (shard.observation_dim, shard.action_dim), (self.observation_dim, self.action_dim)
            if found != wanted:
                raise DataError(
                    f"{shard.path} has observations and actions of sizes {found}; {shards[0].path} has {wanted}: read them apart, "
                    "or collect the tasks together, which pads them"
                )
        self._named = _named(shards)
        if episodes is None:
            episodes = torch.cat([torch.stack([torch.full((len(d),), s), torch.arange(len(d))], 1) for s, d in enumerate(shards)])
        self.episodes = episodes.reshape(-1, 2)
        self._lengths = torch.tensor([shard.length for shard in shards])

    @classmethod
    def open(cls, root: str | os.PathLike[str], *, verify: bool = True) -> ReplaySet:
        """Open a file or folder of episodes.

        Args:
            root: A shard, a folder whose shards ``*.pt`` are taken in order of their names, or a Minari data set (see ``open_minari``).
            verify: As in ``ReplayShard``.

        Raises:
            DataError: There is no shard, or one cannot be read.
        """
        if minari_file(root) is not None:
            return cls(open_minari(root))
        place = Path(root)
        files = [place] if place.exists() and not place.is_dir() else entries(place, ".pt")
        if not files:
            raise DataError(f"no replay shard (*.pt) and no Minari data set in {place}; make some with `ttcfast collect out={place}`")
        return cls([ReplayShard(file, verify=verify) for file in files])

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def __getitem__(self, i: int) -> Episode:
        if not -len(self) <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)}")
        shard, place = self.episodes[i].tolist()
        return self.shards[shard].episode(place)

    def tasks(self) -> Tensor:
        """Return the task number of each episode, ``[N]`` int64."""
        held = [shard.tasks() for shard in self.shards]
        return torch.tensor([int(held[shard][place]) for shard, place in self.episodes.tolist()])

    def task_names(self, given: Sequence[str] = ()) -> list[str]:
        """Return the names of tasks 0 to the largest number, as recorded by ``ttcfast collect``; others are called ``task-<number>``.

        Args:
            given: Names in the order of their numbers, for data that record none, such as TD-MPC2's published shards.

        Raises:
            DataError: There are fewer names than tasks, or the data record another name.
        """
        count = int(self.tasks().max()) + 1
        if given and len(given) < count:
            raise DataError(f"tasks names {len(given)} tasks; {self.shards[0].path.parent} has numbers up to {count - 1}: name {count}")
        names = dict(enumerate(given or [f"task-{n}" for n in range(count)]))
        for number, name in self._named.items():
            if given and given[number] != name:
                raise DataError(f"tasks[{number}] is {given[number]!r}; the data call this task {name!r}: give tasks in their order")
        names |= self._named
        return [names[n] for n in sorted(names)]

    def of_task(self, number: int) -> ReplaySet:
        """Return the episodes of the task of this number.

        Raises:
            DataError: There is none.
        """
        chosen = self.episodes[self.tasks() == number]
        if not len(chosen):
            raise DataError(f"{self.shards[0].path.parent} holds no episode of task {number}; give data=, or collect some of it")
        kept = chosen[:, 0].unique()
        places = torch.searchsorted(kept, chosen[:, 0].contiguous())
        return ReplaySet([self.shards[s] for s in kept.tolist()], torch.stack([places, chosen[:, 1]], 1))

    def require_task(self, task: str) -> None:
        """Raise ``DataError`` unless there are episodes of the task of this name; data that name no tasks pass.

        The tasks of TD-MPC2's published shards have numbers alone.
        """
        if self._named and task not in self._named.values():
            held = ", ".join(sorted(self._named.values()))
            raise DataError(f"{self.shards[0].path.parent} holds episodes of {held}, none of {task}; give data=, or collect some of it")

    def lengths(self) -> Tensor:
        """Return the number of steps of each episode, ``[N]`` int64."""
        return self._lengths[self.episodes[:, 0]]

    def returns(self) -> Tensor:
        """Return the sum of rewards of each episode, ``[N]`` float64."""
        return torch.stack([self[i].rew.double().sum() for i in range(len(self))])

    def split(self, held_out: float, seed: int = 0) -> tuple[ReplaySet, ReplaySet]:
        """Split into training and held-out episodes, drawn at random as whole episodes; both keep their order.

        Args:
            held_out: Share of held-out episodes, in (0, 1); both parts have at least one.
            seed: Random seed of the draw.

        Raises:
            ValueError: ``held_out`` lies outside (0, 1).
            DataError: There are fewer than two episodes.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}; give a share above 0 and below 1")
        if len(self) < 2:
            raise DataError(f"{len(self)} episode cannot be split into training and held-out episodes; collect more")
        count = min(max(1, round(held_out * len(self))), len(self) - 1)
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.from_numpy(np.random.default_rng(seed).permutation(len(self))[:count])] = True
        return ReplaySet(self.shards, self.episodes[~chosen]), ReplaySet(self.shards, self.episodes[chosen])

    def windows(self, episodes: Tensor, starts: Tensor, horizon: int) -> Windows:
        """Read windows of ``horizon`` steps that start at steps ``starts [B]`` of ``episodes [B]``.

        Raises:
            IndexError: An episode or window does not exist.
            DataError: The data are damaged.
        """
        batch = len(episodes)
        obs = torch.empty(batch, horizon + 1, self.observation_dim)
        act, rew = torch.empty(batch, horizon, self.action_dim), torch.empty(batch, horizon)
        task = torch.empty(batch, dtype=torch.int64)
        shards, places = self.episodes[episodes].unbind(1)
        for s in shards.unique().tolist():
            of = (shards == s).nonzero()[:, 0]
            obs[of], act[of], rew[of], task[of] = self.shards[s].windows(places[of], starts[of], horizon)
        return Windows(obs.transpose(0, 1).contiguous(), act.transpose(0, 1).contiguous(), rew.t()[..., None].contiguous(), task)

    def grid(self, horizon: int, stride: int) -> tuple[Tensor, Tensor]:
        """Return a window every ``stride`` steps of every episode, for evaluation: episodes ``[B]`` and starts ``[B]``, int64.

        Raises:
            ValueError: ``stride`` is below 1, or ``horizon`` exceeds every episode.
        """
        whole("stride", stride, 1)
        _check_horizon(self, horizon)
        pairs = [(i, t) for i, length in enumerate(self.lengths().tolist()) for t in range(0, length - horizon + 1, stride)]
        episodes, starts = torch.tensor(pairs).unbind(1)
        return episodes, starts

    def observation_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each observation entry, ``[O]`` float64 each."""
        shift = self[0].obs.double().mean(0)  # sums of squares far from 0 would lose digits
        mean, std = mean_std(moments((self[i].obs.double() - shift).t()) for i in range(len(self)))
        return mean + shift, std


class ReplaySampler:
    """Draws windows uniformly; those of a step depend on (seed, step) alone, so that a resumed run sees the same windows.

    Args:
        data: Episodes.
        horizon: H, steps per window.
        seed: Random seed of the draws.

    Raises:
        ValueError: ``horizon`` is below 1 or exceeds every episode.
    """

    def __init__(self, data: ReplaySet, horizon: int, *, seed: int = 0) -> None:
        _check_horizon(data, horizon)
        at_least("seed", seed, 0)
        self.data, self.horizon, self.seed = data, horizon, seed
        self._ends = (data.lengths() - horizon + 1).clamp_min(0).cumsum(0).numpy()

    def __len__(self) -> int:
        """Number of windows."""
        return int(self._ends[-1])

    def batch(self, step: int, size: int) -> Windows:
        """Draw the ``size`` windows of training step ``step``."""
        drawn = np.random.default_rng([self.seed, step]).integers(len(self), size=size)
        episodes = np.searchsorted(self._ends, drawn, side="right")
        starts = drawn - np.concatenate([[0], self._ends])[episodes]
        return self.data.windows(torch.from_numpy(episodes), torch.from_numpy(starts), self.horizon)


def _named(shards: Sequence[Shard]) -> dict[int, str]:
    """Return the names of tasks by number, where shards record them.

    Raises:
        DataError: Two shards give a number to different tasks, or a task different numbers.
    """
    by_number: dict[int, tuple[str, Path]] = {}
    by_name: dict[str, tuple[int, Path]] = {}
    for shard in shards:
        if not {"number", "task"} <= shard.parameters.keys():
            continue
        number, name = shard.parameters["number"], shard.parameters["task"]
        (named, first), (numbered, other) = by_number.setdefault(number, (name, shard.path)), by_name.setdefault(name, (number, shard.path))
        if named != name:
            raise DataError(f"{shard.path} holds {name} as task {number}, {first} {named}: read them apart, or collect the tasks together")
        if numbered != number:
            raise DataError(f"{shard.path} holds {name} as task {number}, {other} as task {numbered}: collect the tasks together")
    return {number: name for number, (name, _) in by_number.items()}


def _check_horizon(data: ReplaySet, horizon: int) -> None:
    whole("horizon", horizon, 1)
    longest = int(data.lengths().max())
    if horizon > longest:
        raise ValueError(f"horizon is {horizon}; the longest episode has {longest} steps: give at most that")
