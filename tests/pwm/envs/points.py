"""A point that moves on a line, in an environment that can fail as simulators do; importable in worker processes."""

from __future__ import annotations

import os

import numpy as np


class Point:
    """``x' = x + 0.1 a``, reward ``x'``, over after ``steps``; starts at a place drawn from the seed.

    Args:
        steps: Steps per episode.
        fails: What goes wrong (``"raise"``, ``"nan"``, ``"inf reward"``, ``"shape"``, ``"exit"``, ``"endless"``), from step ``at`` on in
            episodes whose seed is in ``seeds``; step 0 is the reset.
    """

    name, observation_dim, action_dim = "point", 2, 1

    def __init__(self, steps: int = 5, fails: str = "", seeds: tuple[int, ...] = (), at: int = 3) -> None:
        self.episode_length, self._fails, self._seeds, self._at = steps, fails, seeds, at

    def reset(self, seed: int) -> np.ndarray:
        self._seed, self._t, self._x = seed, 0, float(np.random.default_rng(seed).uniform(-1, 1))
        return self._observation()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self._t += 1
        self._x += 0.1 * float(action[0])
        reward = np.inf if self._broken("inf reward") else self._x
        return self._observation(), reward, self._t >= self.episode_length and not self._broken("endless")

    def _broken(self, how: str) -> bool:
        return self._fails == how and self._seed in self._seeds and self._t >= self._at

    def _observation(self) -> np.ndarray:
        if self._broken("raise"):
            raise FloatingPointError("the simulation blew up")
        if self._broken("exit"):
            os._exit(7)
        if self._broken("shape"):
            return np.zeros(3)
        return np.array([np.nan if self._broken("nan") else self._x, self._t], dtype=np.float32)


class Wide(Point):
    name, observation_dim = "wide", 3


def unmakeable() -> Point:
    raise ZeroDivisionError("no such thing")
