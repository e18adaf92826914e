"""Headless dm_control tasks as in TD-MPC2 and PWM: flat observations, repeated actions in [-1, 1], episodes of fixed length."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.checks import one_of, whole
from ttcfast.runtime.errors import ArgumentError, MissingPackageError

# The tasks of TD-MPC2's MT30 that dm_control provides, under TD-MPC2's names; MT30 adds 11 variations of its own.
TASKS = (
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "reacher-easy",
    "reacher-hard",
    "acrobot-swingup",
    "pendulum-swingup",
    "cartpole-balance",
    "cartpole-balance-sparse",
    "cartpole-swingup",
    "cartpole-swingup-sparse",
    "cup-catch",
    "finger-spin",
    "finger-turn-easy",
    "finger-turn-hard",
    "fish-swim",
    "hopper-stand",
    "hopper-hop",
)
_DOMAINS = {"cup": "ball_in_cup"}


class DMControlEnv:
    """A dm_control task with episodes of 1000 simulation steps, which never end earlier.

    Rendering is disabled (``MUJOCO_GL=disabled``) unless the environment variable is set, so no display is needed.

    Args:
        task: One of ``TASKS``, such as ``"cartpole-swingup"``.
        action_repeat: Simulation steps per agent step, whose rewards are summed, so that a return is at most 1000.

    Attributes:
        name: The task, as given.
        observation_dim, action_dim: Sizes of a flat observation and of an action.
        episode_length: Agent steps per episode.
        control_timestep: Seconds per simulation step.
        physics: Simulator of dm_control, for reading.

    Raises:
        ArgumentError: The task is unknown, or the action repeat does not divide 1000.
        MissingPackageError: dm_control is not installed, or does not work with the installed mujoco.

    Source: Hansen, Su and Wang, "TD-MPC2", 2023, whose wrapper fixes action repeat and observation order.
    """

    def __init__(self, task: str, *, action_repeat: int = 2) -> None:
        one_of("task", task, TASKS)
        whole("action_repeat", action_repeat, 1)
        self.task = self.name = task
        self.action_repeat = action_repeat
        self._env = _load(task)
        limits = self._env.action_spec()
        self._low, self._span = limits.minimum, limits.maximum - limits.minimum
        steps = round(self._env._step_limit)
        if steps % action_repeat:
            raise ArgumentError(f"action_repeat is {action_repeat}; it must divide the {steps} simulation steps of an episode")
        self.episode_length = steps // action_repeat
        self.action_dim = int(np.prod(limits.shape))
        self.observation_dim = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
        self.control_timestep = float(self._env.control_timestep())
        self.physics: Any = self._env.physics
        self._left = 0

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Start an episode whose initial state depends only on ``seed``, and return its observation ``[O]``."""
        self._env.task.random.seed(seed)
        self._left = self.episode_length
        return _flat(self._env.reset().observation)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool]:
        """Make one agent step.

        Args:
            action: Action ``[A]`` in [-1, 1].

        Returns:
            Observation ``[O]``, reward (summed over the repeats, at most ``action_repeat``), and whether the episode is over.

        Raises:
            ArgumentError: The action has another size, lies outside [-1, 1] or is not finite, or the episode is over.
        """
        if self._left == 0:
            raise ArgumentError(f"{self.task}: the episode of {self.episode_length} steps is over; call reset(seed)")
        scaled, task, reward = self._scaled(action), self._env.task, 0.0
        for _ in range(self.action_repeat):  # as dm_control's own step, which would compute the observation of every repeat
            task.before_step(scaled, self.physics)
            self.physics.step(self._env._n_sub_steps)
            task.after_step(self.physics)
            reward += float(task.get_reward(self.physics))
        self._left -= 1
        return _flat(task.get_observation(self.physics)), reward, self._left == 0

    def state(self) -> NDArray[np.float64]:
        """Return the simulator's positions and velocities, ``[nq + nv]``."""
        return np.array(self.physics.get_state(), dtype=np.float64)

    def set_state(self, state: NDArray[np.float64]) -> NDArray[np.float32]:
        """Continue the current episode from the simulator's ``state [nq + nv]``, and return its observation ``[O]``."""
        with self.physics.reset_context():
            self.physics.set_state(state)
        return _flat(self._env.task.get_observation(self.physics))

    def transition(self, state: NDArray[np.float64], action: NDArray[Any]) -> NDArray[np.float64]:
        """Return the state after one agent step of the simulator from ``state [nq + nv]``; ends the current episode.

        Raises:
            ArgumentError: As :meth:`step`.
        """
        scaled = self._scaled(action)
        self._left = 0
        with self.physics.reset_context():
            self.physics.set_state(state)
        self.physics.set_control(scaled)
        self.physics.step(self.action_repeat)
        return self.state()

    def _scaled(self, action: NDArray[Any]) -> NDArray[np.float64]:
        """Return ``action`` in the task's own units."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (self.action_dim,):
            raise ArgumentError(f"action has shape {given.shape}; {self.task} takes ({self.action_dim},)")
        if not (np.abs(given) <= 1).all():
            raise ArgumentError(f"action is {given.tolist()}; every entry must lie in [-1, 1]: clip it")
        return self._low + 0.5 * (given + 1) * self._span


def versions() -> dict[str, str]:
    """Return the versions of the simulator, on which the physics depends.

    Raises:
        MissingPackageError: dm_control is not installed.
    """
    from importlib.metadata import version

    _suite()
    return {name: version(name) for name in ("mujoco", "dm_control")}


def _load(task: str) -> Any:
    domain, _, rest = task.partition("-")
    try:
        return _suite().load(_DOMAINS.get(domain, domain), rest.replace("-", "_"), task_kwargs={"random": 0})
    except AttributeError as error:  # raised by dm_control 1.0.50 with mujoco 4, whose model has other fields
        found = versions()
        raise MissingPackageError(
            f"dm_control {found['dm_control']} does not work with mujoco {found['mujoco']} ({error}); "
            "pip install 'ttcfast[dmc]' brings one that it works with"
        ) from error


def _suite() -> Any:
    os.environ.setdefault("MUJOCO_GL", "disabled")
    try:
        from dm_control import suite
    except ImportError as error:
        if sys.version_info >= (3, 13):  # labmaze, which dm_control needs, has no wheels for it
            raise MissingPackageError(f"task needs the package dm_control, which installs on Python 3.10 to 3.12 ({error})") from error
        raise MissingPackageError.of("task", "dm_control", "dmc", error) from error
    return suite


def _flat(observation: Mapping[str, Any]) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)
