"""Exploring starts: states drawn over a task's whole range, and random actions that are held, to show a world model what no policy visits.

A world model trained on a policy's episodes alone is wrong beside them, where an actor that follows its gradients soon arrives. Exploring
starts (Sutton and Barto, Reinforcement Learning, 2018, section 5.3) begin short episodes anywhere instead.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.runtime.errors import ArgumentError

from .base import Environment
from .controllers import Array, Controller
from .dm_control import DMControlEnv

# MuJoCo's mjtJoint.
_FREE, _BALL, _SLIDE, _HINGE = range(4)
# Contacts deeper than this many metres throw the bodies apart.
_DEPTH = 1e-3
_DRAWS = 20
# Episodes and steps of the probe that finds the speeds which a task's actions and gravity reach, and their quantile that is taken.
_EPISODES, _STEPS, _QUANTILE = 20, 50, 0.99


class HeldController(Controller):
    """Random actions, each held for 1 to 11 steps; uniform in [-1.3, 1.3] and clipped to [-1, 1], so that the limits are tried too."""

    LONGEST, REACH = 11, 1.3

    def __init__(self, env: Environment) -> None:
        self._action = np.zeros(env.action_dim)
        self._left = 0

    def start(self, random: np.random.Generator) -> dict[str, float]:
        self._left = 0
        return {}

    def act(self, observation: NDArray[Any], random: np.random.Generator) -> Array:
        if self._left == 0:
            self._action = np.clip(random.uniform(-self.REACH, self.REACH, len(self._action)), -1.0, 1.0)
            self._left = int(random.integers(1, self.LONGEST + 1))
        self._left -= 1
        return self._action.copy()


class ExploringStarts:
    """Draws simulator states of a dm_control task.

    Everything starts as at the task's own reset, which also draws its targets. Joints with limits are then drawn uniformly between them,
    free hinges over a whole turn, and orientations over all rotations; the rest (sliding joints without limits, such as a walker's place,
    and hinges that a spring or servo holds, such as a fish's fins) stays. A draw in which bodies overlap is repeated, and after 20 of them
    the positions of the reset are taken. Each speed is uniform between the largest ones, of either sign, that the simulator reaches within
    50 steps from such positions at rest under held random actions (the 99 % quantile over 20 episodes of a fixed random seed): no formula
    knows them for every mechanism.

    Args:
        env: The environment.
        speeds: The largest speeds, found for the same task before; None plays the episodes that find them, about half a second.

    Attributes:
        speeds: Largest speed of each degree of freedom, ``[nv]``.

    Raises:
        ArgumentError: It is no dm_control environment.
    """

    def __init__(self, env: Environment, speeds: Array | None = None) -> None:
        self._env = with_state(env)
        self.speeds = np.zeros(self._env.physics.model.nv) if speeds is None else speeds
        if speeds is None:
            self.speeds = self._probe(np.random.default_rng(0))

    def reset(self, random: np.random.Generator) -> NDArray[np.float32]:
        """Start an episode in a state drawn with ``random``, and return its observation ``[O]``."""
        physics = self._env.physics
        self._env.reset(int(random.integers(2**31)))
        rest = np.array(physics.data.qpos)
        speeds = random.uniform(-self.speeds, self.speeds)
        for _ in range(_DRAWS):
            observation = self._env.set_state(np.concatenate([_positions(physics.model, rest, random), speeds]))
            if _depth(physics) < _DEPTH:
                return observation
        return self._env.set_state(np.concatenate([rest, speeds]))

    def _probe(self, random: np.random.Generator) -> Array:
        from dm_control.rl.control import PhysicsError

        controller, found = HeldController(self._env), []
        for _ in range(_EPISODES):
            observation = self.reset(random)
            controller.start(random)
            with contextlib.suppress(PhysicsError):  # the simulation diverged; its earlier steps count
                for _ in range(min(_STEPS, self._env.episode_length)):
                    observation, _, _ = self._env.step(controller.act(observation, random))
                    found.append(np.abs(self._env.physics.data.qvel))
        return np.quantile(np.stack(found), _QUANTILE, axis=0)


def with_state(env: Environment) -> DMControlEnv:
    """Return ``env``, or raise ``ArgumentError`` unless its simulator can be set into any state."""
    if not isinstance(env, DMControlEnv):
        raise ArgumentError(f"exploring starts set the simulator's state, which {env.name} does not allow; set exploring=0")
    return env


def _positions(model: Any, rest: Array, random: np.random.Generator) -> Array:
    """Draw the positions ``[nq]`` of all joints; those that have no range keep ``rest``."""
    positions = rest.copy()
    for kind, limited, limits, stiffness, at in zip(
        model.jnt_type, model.jnt_limited, model.jnt_range, model.jnt_stiffness, model.jnt_qposadr
    ):
        if kind in (_SLIDE, _HINGE) and limited:
            positions[at] = random.uniform(*limits)
        elif kind == _HINGE and stiffness == 0 and not limits.any():
            positions[at] = random.uniform(-np.pi, np.pi)
        elif kind in (_FREE, _BALL):
            first = at + 3 if kind == _FREE else at
            turn = random.standard_normal(4)
            positions[first : first + 4] = turn / np.linalg.norm(turn)
    return positions


def _depth(physics: Any) -> float:
    """Return how far the most overlapping bodies lie in each other, in metres."""
    count = physics.data.ncon
    return max(0.0, -float(physics.data.contact.dist[:count].min())) if count else 0.0
