"""Training states for a dense reward model taken from rollouts that the model itself corrects as it learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.data import TrajectorySet
from ttcfast.data.symmetry import random_symmetry


class RolloutPool:
    """As many rollouts as a batch has samples, each along a trajectory of its own; every training step takes them one step on.

    A reward model that is used inside a rollout meets the states that its own choices lead to. Here it meets them while it is trained: a
    rollout starts on the truth at a random time, under a random symmetry, goes on from the corrected state, and is begun anew at the
    trajectory's end, with probability ``restart`` before it, or where it is no longer finite.

    Args:
        data: trajectories, conserved variables.
        size: rollouts. restart: probability, per step, of beginning anew; 1 gives the truth's states alone. seed: of all choices.

    Source: data aggregation along the learner's own rollouts (DAgger, arXiv:1011.0686), for a one-step corrector.
    """

    def __init__(self, data: TrajectorySet, size: int, *, restart: float, seed: int) -> None:
        at_least("size", size, 1)
        if not 0 <= restart <= 1:
            raise ValueError(f"restart is {restart}; give a probability")
        self.data, self.spec, self.restart, self.seed = data, data.spec, restart, seed
        self.last = len(data.times) - 1
        self.time = torch.zeros(size, dtype=torch.int64)
        self.truth = torch.empty(size, self.last + 1, data.spec.num_channels, *data.shape)
        self.state = torch.empty(size, data.spec.num_channels, *data.shape)
        for slot in range(size):
            self._begin(slot, np.random.default_rng([seed, 3, slot]))

    def batch(self) -> tuple[Tensor, Tensor]:
        """States ``[M, C, *S]`` and the truth one step later, in physical units."""
        return self.state.clone(), self.truth[torch.arange(len(self.time)), self.time + 1]

    def advance(self, after: Tensor, step: int) -> None:
        """Go on from the states ``after`` ``[M, C, *S]``; ``step`` (of training) chooses which rollouts begin anew."""
        rng = np.random.default_rng([self.seed, 4, step])
        ends = rng.random(len(self.time)) < self.restart
        self.time += 1
        self.state = after.detach().cpu().float()
        finite = self.state.isfinite().flatten(1).all(1)
        for slot in range(len(self.time)):
            if ends[slot] or int(self.time[slot]) >= self.last or not bool(finite[slot]):
                self._begin(slot, rng)

    def state_dict(self) -> dict[str, Tensor]:
        return {"time": self.time, "truth": self.truth, "state": self.state}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        self.time, self.truth, self.state = (values[name].clone() for name in ("time", "truth", "state"))

    def _begin(self, slot: int, rng: np.random.Generator) -> None:
        trajectory = self.data.read(int(rng.integers(len(self.data))))
        self.truth[slot] = random_symmetry(trajectory.unsqueeze(0), self.spec, rng)[0]
        self.time[slot] = int(rng.integers(self.last))
        self.state[slot] = self.truth[slot, self.time[slot]]
