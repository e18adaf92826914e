"""What an environment offers to collection, evaluation and planning, and one padded to the sizes of several tasks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ttcfast.runtime.errors import ArgumentError


class Environment(Protocol):
    """One agent in one simulator, with flat observations, actions in [-1, 1] and episodes of a fixed length.

    One whose episodes may end on their own before, after which nothing changes and nothing is earned, says so in a further attribute
    ``terminated`` (bool). One whose simulator can be set into any state has :class:`Settable`'s methods.

    Attributes:
        name: Name of the task.
        observation_dim: O, size of an observation.
        action_dim: A, size of an action.
        episode_length: Agent steps per episode.
    """

    name: str
    observation_dim: int
    action_dim: int
    episode_length: int

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Start an episode whose course depends only on ``seed`` and the actions, and return its observation ``[O]``."""
        ...

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool]:
        """Make one agent step with ``action [A]`` in [-1, 1]; return observation ``[O]``, reward, and whether the episode is over."""
        ...


@runtime_checkable
class Settable(Environment, Protocol):
    """An environment whose simulator can be set into any state; what a reset draws beside it, such as a target, stays."""

    def state(self) -> NDArray[np.float64]:
        """Return the simulator's state, a vector."""
        ...

    def set_state(self, state: NDArray[np.float64]) -> NDArray[np.float32]:
        """Continue the current episode from ``state``, and return its observation ``[O]``."""
        ...


class PaddedEnv:
    """An environment with zeros behind its observation and with entries of the action that it ignores, as in MT30.

    Args:
        env: The environment.
        observation_dim, action_dim: Sizes to pad to.

    Raises:
        ArgumentError: A size is smaller than the environment's own.
    """

    def __init__(self, env: Environment, observation_dim: int, action_dim: int) -> None:
        for what, size, least in (("observation_dim", observation_dim, env.observation_dim), ("action_dim", action_dim, env.action_dim)):
            if size < least:
                raise ArgumentError(f"{what} is {size}; {env.name} has {least}: give at least that")
        self.env, self.name, self.episode_length = env, env.name, env.episode_length
        self.observation_dim, self.action_dim = observation_dim, action_dim

    def reset(self, seed: int) -> NDArray[np.float32]:
        return self._padded(self.env.reset(seed))

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool]:
        given = np.asarray(action)
        if given.shape != (self.action_dim,):
            raise ArgumentError(f"action has shape {given.shape}; {self.name}, padded, takes ({self.action_dim},)")
        observation, reward, over = self.env.step(given[: self.env.action_dim])
        return self._padded(observation), reward, over

    @property
    def terminated(self) -> bool:
        """Whether the episode has ended on its own."""
        return bool(getattr(self.env, "terminated", False))

    def _padded(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.pad(observation, (0, self.observation_dim - len(observation)))


def raised(env: Environment, error: Exception) -> str:
    """Return what the simulator did, in one line."""
    return f"{env.name} raised {type(error).__name__}: {' '.join(str(error).split())}"
