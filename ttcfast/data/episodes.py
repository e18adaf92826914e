"""Episodes, and shards of episodes of one length, however they are stored."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError


@dataclass(frozen=True)
class Episode:
    """One episode: ``obs [T+1, O]``, ``act [T, A]`` in [-1, 1], ``rew [T]``, float32, and the number of its task.

    ``act[t]`` leads from ``obs[t]`` to ``obs[t+1]`` and earns ``rew[t]``.
    """

    obs: Tensor
    act: Tensor
    rew: Tensor
    task: int = 0


class Shard(ABC):
    """Episodes of one length of one file. Instances can be pickled for workers, which read the values themselves.

    Args:
        path: The file.
        held: Values in TD-MPC2's layout: ``obs [E, T+1, O]``, ``action [E, T+1, A]``, ``reward [E, T+1]`` and ``task [E, T+1]``; row t
            holds the action and the reward that led to its observation, and row 0 NaN.
        parameters: How the episodes were made.

    Attributes:
        path: The file.
        length: T, steps per episode.
        observation_dim: O, size of an observation.
        action_dim: A, size of an action.
        parameters: How the episodes were made.
    """

    def __init__(self, path: Path, held: dict[str, Tensor], parameters: Mapping[str, Any]) -> None:
        self.path, self.parameters = path, dict(parameters)
        self._held: dict[str, Tensor] | None = held
        self._process = os.getpid()
        self._count, rows, self.observation_dim = held["obs"].shape
        self.length, self.action_dim = rows - 1, held["action"].shape[2]

    @abstractmethod
    def _load(self) -> dict[str, Tensor]:
        """Read the values again."""

    def __len__(self) -> int:
        """Number of episodes."""
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None, "_process": -1}

    def tasks(self) -> Tensor:
        """Return the task number of each episode, ``[E]`` int64."""
        return self._tensors()["task"][:, 1].long()

    def episode(self, i: int) -> Episode:
        """Return episode ``i``.

        Raises:
            IndexError: There is no such episode.
            DataError: It holds values that are not finite.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"episode {i} of {len(self)} in {self.path}")
        obs, act, rew, task = self.windows(torch.tensor([i]), torch.tensor([0]), self.length)
        return Episode(obs[0], act[0], rew[0], int(task[0]))

    def windows(self, episodes: Tensor, starts: Tensor, horizon: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read ``horizon`` steps of each of B episodes.

        Args:
            episodes: ``[B]`` int64.
            starts: First step of each window, ``[B]`` int64.
            horizon: H, steps per window.

        Returns:
            ``obs [B, H+1, O]``, ``act [B, H, A]``, ``rew [B, H]``, float32, and ``task [B]`` int64.

        Raises:
            IndexError: A window extends beyond its episode.
            DataError: Values are not finite.
        """
        if starts.numel() and not (int(starts.min()) >= 0 and int(starts.max()) + horizon <= self.length):
            raise IndexError(
                f"windows of {horizon} steps from {int(starts.min())} to {int(starts.max())}; episodes have {self.length} steps"
            )
        held = self._tensors()
        rows = starts[:, None] + torch.arange(horizon + 1)
        of = episodes[:, None]
        obs = held["obs"][of, rows].float()
        act, rew = (held[name][of, rows[:, 1:]].float() for name in ("action", "reward"))
        for name, values in (("obs", obs), ("action", act), ("reward", rew)):
            if not values.isfinite().all():
                bad = int(episodes[~values.flatten(1).isfinite().all(1)][0])
                raise DataError(f"{self.path} is damaged: {name} of episode {bad} is not finite; make or copy it again")
        return obs, act, rew, held["task"][episodes, 1].long()

    def _tensors(self) -> dict[str, Tensor]:
        if self._held is None or self._process != os.getpid():
            self._held = self._load()
            self._process = os.getpid()
        return self._held


def after_reset(values: Tensor) -> Tensor:
    """Prepend a row of NaN, which stands for the reset, to ``values [T, ...]``."""
    return torch.cat([torch.full_like(values[:1], torch.nan), values])
