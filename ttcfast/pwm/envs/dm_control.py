"""dm_control tasks as TD-MPC2 and PWM see them: flat observations, actions in [-1, 1], repeated, episodes of fixed length. Headless."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.checks import one_of, whole
from ttcfast.runtime.errors import ArgumentError, MissingPackageError

# The tasks of TD-MPC2's MT30 that dm_control has as they are, in TD-MPC2's names (its other 11 are variations of its own).
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
    """One task. An episode is 1000 simulation steps: ``episode_length`` agent steps of ``action_repeat`` each, never ended earlier.

    Args:
        task: one of ``TASKS``, such as ``"cartpole-swingup"``.
        action_repeat: simulation steps per agent step; their rewards are added, so that a return is at most 1000 whatever it is.

    Attributes:
        observation_dim, action_dim: sizes of a flat observation and of an action.
        episode_length: agent steps of an episode.
        physics: dm_control's simulator, to be read.

    Raises:
        ArgumentError: an unknown task, or an action repeat that does not divide 1000.
        MissingPackageError: dm_control is not installed, or with a version of mujoco that it does not work with.

    Rendering is switched off (``MUJOCO_GL=disabled``) unless the environment variable says otherwise, so no display is needed.

    Source: Hansen, Su and Wang, "TD-MPC2", 2023, whose wrapper fixes action repeat and observation order.
    """

    def __init__(self, task: str, *, action_repeat: int = 2) -> None:
        one_of("task", task, TASKS)
        whole("action_repeat", action_repeat, 1)
        self.task, self.action_repeat = task, action_repeat
        self._env = _load(task)
        limits = self._env.action_spec()
        self._low, self._span = limits.minimum, limits.maximum - limits.minimum
        steps = round(self._env._step_limit)
        if steps % action_repeat:
            raise ArgumentError(f"action_repeat is {action_repeat}; it must divide the {steps} simulation steps of an episode")
        self.episode_length = steps // action_repeat
        self.action_dim = int(np.prod(limits.shape))
        self.observation_dim = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
        self.physics: Any = self._env.physics
        self._left = 0

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Start an episode whose initial state depends on ``seed`` alone, not on the episodes before.

        Returns:
            The observation ``[O]``.
        """
        self._env.task.random.seed(seed)
        self._left = self.episode_length
        return _flat(self._env.reset())

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool]:
        """One agent step.

        Args:
            action: ``[A]`` in [-1, 1].

        Returns:
            Observation ``[O]``, reward (sum over the repeats, at most ``action_repeat``), and whether the episode is over.

        Raises:
            ArgumentError: an action of another size, outside [-1, 1] or not finite; a step beyond the end of the episode.
        """
        if self._left == 0:
            raise ArgumentError(f"{self.task}: the episode of {self.episode_length} steps is over; call reset(seed)")
        scaled = self._scaled(action)
        reward = 0.0
        for _ in range(self.action_repeat):
            step = self._env.step(scaled)
            reward += float(step.reward)
        self._left -= 1
        return _flat(step), reward, self._left == 0

    def state(self) -> NDArray[np.float64]:
        """The simulator's positions and velocities, ``[nq + nv]``."""
        return np.array(self.physics.get_state(), dtype=np.float64)

    def transition(self, state: NDArray[np.float64], action: NDArray[Any]) -> NDArray[np.float64]:
        """Where one agent step leads from ``state [nq + nv]``, by the simulator itself. It ends the episode that was running.

        Raises:
            ArgumentError: as :meth:`step`.
        """
        scaled = self._scaled(action)
        self._left = 0
        with self.physics.reset_context():
            self.physics.set_state(state)
        self.physics.set_control(scaled)
        self.physics.step(self.action_repeat)
        return self.state()

    def _scaled(self, action: NDArray[Any]) -> NDArray[np.float64]:
        """``action`` in the task's own units."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (self.action_dim,):
            raise ArgumentError(f"action has shape {given.shape}; {self.task} takes ({self.action_dim},)")
        if not (np.abs(given) <= 1).all():
            raise ArgumentError(f"action is {given.tolist()}; every entry must lie in [-1, 1]: clip it")
        return self._low + 0.5 * (given + 1) * self._span


def versions() -> dict[str, str]:
    """Versions of the simulator, which decide the physics.

    Raises:
        MissingPackageError: it is not installed.
    """
    from importlib.metadata import version

    _suite()
    return {name: version(name) for name in ("mujoco", "dm_control")}


def _load(task: str) -> Any:
    domain, _, rest = task.partition("-")
    try:
        return _suite().load(_DOMAINS.get(domain, domain), rest.replace("-", "_"), task_kwargs={"random": 0})
    except AttributeError as error:  # what dm_control 1.0.50 says on mujoco 4, whose model has other fields
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


def _flat(step: Any) -> NDArray[np.float32]:
    return np.concatenate([np.ravel(value) for value in step.observation.values()]).astype(np.float32)
