"""Environments of gymnasium as ours, and ours as environments of gymnasium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.checks import whole
from ttcfast.runtime.errors import ArgumentError, MissingPackageError

from .base import Environment


class GymnasiumEnv:
    """An environment of gymnasium with ``Box`` observations and actions, as one of ours.

    Observations are flattened, those of a ``Dict`` or ``Tuple`` of boxes joined in its order. Actions in [-1, 1] are scaled to the bounds
    of the action space. Every episode has ``episode_length`` agent steps: one that terminates goes on in an absorbing state, which repeats
    the last observation and earns 0 whatever the action, so that all episodes of a shard have one length and a world model learns the end
    as dynamics, without a head that predicts termination.

    Args:
        env: Name of a registered environment, such as ``"Pendulum-v1"``, or an instance.
        episode_length: Agent steps per episode; None takes the registered limit of steps divided by ``action_repeat``.
        action_repeat: Steps of the environment per agent step, whose rewards are summed.

    Attributes:
        name: ``"gymnasium:"`` and the registered name.
        observation_dim, action_dim: Sizes of a flat observation and of a flat action.
        episode_length: Agent steps per episode.
        env: The environment of gymnasium.

    Raises:
        ArgumentError: The name is not registered, a space is no ``Box``, the actions have no bounds, or the episode has no length.
        MissingPackageError: gymnasium, or a package that the environment needs, is not installed.
    """

    def __init__(self, env: Any, *, episode_length: int | None = None, action_repeat: int = 1) -> None:
        whole("action_repeat", action_repeat, 1)
        if episode_length is not None:
            whole("episode_length", episode_length, 1)
        limit = None if episode_length is None else episode_length * action_repeat
        self.env: Any = _make(env, limit) if isinstance(env, str) else env
        spec = self.env.spec
        self.name = f"gymnasium:{spec.id if spec is not None else type(self.env.unwrapped).__name__}"
        self.action_repeat = action_repeat
        boxes = list(_boxes(self.name, "observation_space", self.env.observation_space))
        self.observation_dim = sum(int(np.prod(box.shape)) for box in boxes)
        self._low, self._high = _bounds(self.name, self.env.action_space)
        self.action_dim = self._low.size
        self.episode_length = self._length(spec) if episode_length is None else episode_length
        self._left, self._ended = 0, False
        self._last = np.zeros(self.observation_dim, dtype=np.float32)

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Start an episode whose initial state depends only on ``seed``, and return its observation ``[O]``."""
        observation, _ = self.env.reset(seed=seed)
        self._left, self._ended, self._last = self.episode_length, False, self._flat(observation)
        return self._last.copy()

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool]:
        """Make one agent step with ``action [A]`` in [-1, 1]; return observation ``[O]``, reward, and whether the episode is over.

        Raises:
            ArgumentError: The action has another size, lies outside [-1, 1] or is not finite, the episode is over, or the environment
                truncates it before ``episode_length``.
        """
        if self._left == 0:
            raise ArgumentError(f"{self.name}: the episode of {self.episode_length} steps is over; call reset(seed)")
        scaled = self._scaled(action)
        self._left -= 1
        reward = 0.0
        for i in range(self.action_repeat):
            if self._ended:
                break
            observation, earned, self._ended, truncated, _ = self.env.step(scaled)
            self._last = self._flat(observation)
            reward += float(earned)
            if truncated and not self._ended and (self._left or i + 1 < self.action_repeat):
                done = self.episode_length - self._left
                raise ArgumentError(f"{self.name} truncated its episode at agent step {done}; give a smaller episode_length")
        return self._last.copy(), reward, self._left == 0

    @property
    def terminated(self) -> bool:
        """Whether the episode has ended on its own and stays in its absorbing state."""
        return self._ended

    def render(self) -> Any:
        """Return a picture ``[height, width, 3]`` of bytes by the environment's own renderer.

        Raises:
            ArgumentError: The environment was not made with ``render_mode="rgb_array"``.
            MissingPackageError: A package that it needs for rendering is not installed.
        """
        if self.env.render_mode != "rgb_array":
            raise ArgumentError(
                f"{self.name} has the render_mode {self.env.render_mode!r}; give GymnasiumEnv(gymnasium.make(..., render_mode='rgb_array'))"
            )
        try:
            return self.env.render()
        except (package().error.DependencyNotInstalled, ImportError) as error:
            raise MissingPackageError(f"rendering {self.name} needs a package that cannot be imported ({error})") from error

    def _length(self, spec: Any) -> int:
        limit = None if spec is None else spec.max_episode_steps
        if limit is None:
            raise ArgumentError(f"episode_length is None and {self.name} has no registered limit of steps; give episode_length")
        if limit % self.action_repeat:
            raise ArgumentError(
                f"action_repeat is {self.action_repeat}; it must divide the {limit} steps of {self.name}, or give episode_length"
            )
        return int(limit) // self.action_repeat

    def _flat(self, observation: Any) -> NDArray[np.float32]:
        parts = list(_leaves(self.env.observation_space, observation))
        return np.concatenate([np.ravel(np.asarray(part)) for part in parts]).astype(np.float32)

    def _scaled(self, action: NDArray[Any]) -> NDArray[Any]:
        """Return ``action`` in the environment's own units and shape."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (self.action_dim,):
            raise ArgumentError(f"action has shape {given.shape}; {self.name} takes ({self.action_dim},)")
        if not (np.abs(given) <= 1).all():
            raise ArgumentError(f"action is {given.tolist()}; every entry must lie in [-1, 1]: clip it")
        space = self.env.action_space
        scaled = self._low + 0.5 * (given + 1) * (self._high - self._low)
        return np.clip(scaled.astype(space.dtype).reshape(space.shape), space.low, space.high)


def as_gymnasium(env: Environment) -> Any:
    """Return ``env`` as a ``gymnasium.Env`` with ``Box`` spaces; episodes are truncated after ``episode_length`` and never terminate.

    Raises:
        MissingPackageError: gymnasium is not installed.
    """
    package()
    from .exported import ExportedEnv

    return ExportedEnv(env)


def package() -> Any:
    """Return the module gymnasium.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise MissingPackageError.of("an environment of gymnasium", "gymnasium", "gym", error) from error
    return gymnasium


def _make(name: str, limit: int | None) -> Any:
    gymnasium = package()
    try:
        return gymnasium.make(name, **({} if limit is None else {"max_episode_steps": limit}))
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise MissingPackageError(f"the environment {name} of gymnasium needs a package that cannot be imported ({error})") from error
    except gymnasium.error.Error as error:
        raise ArgumentError(f"gymnasium has no environment {name} ({error}); `gymnasium.pprint_registry()` lists them") from error


def _boxes(name: str, where: str, space: Any) -> Iterator[Any]:
    """Yield the boxes of a space in order.

    Raises:
        ArgumentError: There is another kind of space.
    """
    spaces = package().spaces
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _boxes(name, f"{where}[{key!r}]", part)
    elif isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            yield from _boxes(name, f"{where}[{i}]", part)
    elif isinstance(space, spaces.Box):
        yield space
    else:
        raise ArgumentError(f"{where} of {name} is {space}; only Box spaces, and for observations Dict and Tuple of them, can be used")


def _leaves(space: Any, value: Any) -> Iterator[Any]:
    """Yield the arrays of an observation in the order of ``_boxes``."""
    parts = getattr(space, "spaces", None)
    if parts is None:
        yield value
        return
    for key, part in parts.items() if hasattr(parts, "items") else enumerate(parts):
        yield from _leaves(part, value[key])


def _bounds(name: str, space: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the bounds ``[A]`` of actions.

    Raises:
        ArgumentError: The space is no bounded ``Box`` of floating-point numbers.
    """
    if not isinstance(space, package().spaces.Box):
        raise ArgumentError(f"action_space of {name} is {space}; only Box actions can be used")
    if space.dtype.kind != "f" or not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ArgumentError(f"action_space of {name} is {space}; its entries must be floating-point numbers with finite bounds")
    return np.ravel(space.low).astype(np.float64), np.ravel(space.high).astype(np.float64)
