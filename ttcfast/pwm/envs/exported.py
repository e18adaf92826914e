"""One of our environments as an environment of gymnasium, which must be installed to import this file."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from .base import Environment


class ExportedEnv(gymnasium.Env):
    """See ``ttcfast.pwm.envs.gymnasium.as_gymnasium``."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (env.observation_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (env.action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        return self.env.reset(int(self.np_random.integers(2**31))), {}

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation, reward, over = self.env.step(action)
        return observation, reward, False, over, {}
