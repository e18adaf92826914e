"""The environments of one process, stepped one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ttcfast.runtime.errors import UserError

from .base import Environment, raised


class Answer(NamedTuple):
    """What one environment returned; ``failure`` says what went wrong, and then the observation is None.

    ``over`` is the end of its steps, ``terminated`` an end on its own.
    """

    observation: NDArray[np.float32] | None
    reward: float
    over: bool
    failure: str | None = None
    terminated: bool = False


class EnvGroup:
    """Environments that are stepped one after the other.

    A simulator that raises, or that returns something that is no finite observation and reward, fails alone: its answer says so. Errors of
    this package's checks (``UserError``), such as an action of the wrong size, are the caller's and are raised.
    """

    def __init__(self, makers: Sequence[Callable[[], Environment]]) -> None:
        self.envs = [make() for make in makers]

    def sizes(self) -> list[tuple[str, int, int, int]]:
        """Return name, observation size, action size and episode length of each environment."""
        return [(env.name, env.observation_dim, env.action_dim, env.episode_length) for env in self.envs]

    def reset(self, places: Sequence[int], seeds: Sequence[int]) -> list[Answer]:
        return [_answer(self.envs[place], seed=seed) for place, seed in zip(places, seeds, strict=True)]

    def step(self, places: Sequence[int], actions: Sequence[NDArray[Any]]) -> list[Answer]:
        return [_answer(self.envs[place], action=action) for place, action in zip(places, actions, strict=True)]


def _answer(env: Environment, *, seed: int = 0, action: NDArray[Any] | None = None) -> Answer:
    """Step the environment, or reset it where there is no action."""
    try:
        observation, reward, over = (env.reset(seed), 0.0, False) if action is None else env.step(action)
        observation, reward = np.asarray(observation, dtype=np.float32), float(reward)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a simulator may raise anything
        return Answer(None, np.nan, True, raised(env, error))
    if observation.shape != (env.observation_dim,):
        return Answer(None, np.nan, True, f"{env.name} returned an observation of shape {observation.shape}, not ({env.observation_dim},)")
    if not (np.isfinite(observation).all() and np.isfinite(reward)):
        what = "a reward" if np.isfinite(observation).all() else "an observation"
        return Answer(None, np.nan, True, f"{env.name} returned {what} that is not finite")
    return Answer(observation, reward, bool(over), terminated=bool(getattr(env, "terminated", False)))
