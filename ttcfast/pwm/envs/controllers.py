"""Scripted controllers for data collection: random actions, and a cart-pole swing-up by energy pumping and LQR."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttcfast.runtime.errors import ArgumentError

from .base import Environment
from .dm_control import DMControlEnv

Array = NDArray[np.float64]


class Controller(ABC):
    """Chooses actions from observations; its settings may change from episode to episode."""

    @abstractmethod
    def start(self, random: np.random.Generator) -> dict[str, float]:
        """Draw the settings of the next episode and return them, to be stored with the data."""

    @abstractmethod
    def act(self, observation: NDArray[Any], random: np.random.Generator) -> Array:
        """Return the action ``[A]`` in [-1, 1] for the observation ``[O]``."""


class RandomController(Controller):
    """Uniform actions in [-1, 1], independent from step to step."""

    def __init__(self, env: Environment) -> None:
        self._size = env.action_dim

    def start(self, random: np.random.Generator) -> dict[str, float]:
        return {}

    def act(self, observation: NDArray[Any], random: np.random.Generator) -> Array:
        return random.uniform(-1.0, 1.0, self._size)


class SwingUpController(Controller):
    """Pumps energy into the pole until LQR can hold it upright; noise on the action degrades it.

    The pumping force has the sign of energy * omega * cos(theta) (Åström and Furuta, Swinging up a pendulum by energy control, 2000), with
    the energy of the pole relative to its upright rest in units of m g l, while the cart is pulled back to the middle of its rail. The pole
    is caught by discrete LQR for the simulator's own agent step, linearised numerically at the upright rest.

    Args:
        env: Environment of a cart-pole task.
        noise: Range from which each episode draws the standard deviation of the Gaussian noise; the return is about 860 of 1000 at 0 and
            about 300 at 2.
        pump: Range from which each episode draws the gain of the pump.

    Raises:
        ArgumentError: The task is not a cart-pole task, or a range is invalid.
    """

    # Angle in rad and speed in rad/s below which LQR catches the pole before the cart meets the end of its rail.
    CATCH_ANGLE, CATCH_SPEED = 0.5, 4.0
    # Pull towards the middle of the rail while pumping, per m and per m/s.
    PULL = (0.3, 0.2)

    def __init__(self, env: Environment, *, noise: tuple[float, float] = (0.0, 2.0), pump: tuple[float, float] = (0.6, 1.5)) -> None:
        env = cartpole(env)
        check_range("noise", noise)
        check_range("pump", pump)
        self.noise, self.pump = noise, pump
        self._frequency_squared = _pole_frequency_squared(env)
        a, b = linearise(env, np.zeros(4))  # upright; cart position, pole angle, and their speeds
        self.gain = lqr_gain(a, b, np.diag([1.0, 10.0, 0.1, 0.1]), np.eye(1))
        self._sigma, self._pumping = noise[0], pump[0]

    def start(self, random: np.random.Generator) -> dict[str, float]:
        self._sigma, self._pumping = random.uniform(*self.noise), random.uniform(*self.pump)
        return {"noise": float(self._sigma), "pump": float(self._pumping)}

    def act(self, observation: NDArray[Any], random: np.random.Generator) -> Array:
        x, cosine, sine, speed, omega = np.asarray(observation, dtype=np.float64)
        angle = np.arctan2(sine, cosine)
        if abs(angle) < self.CATCH_ANGLE and abs(omega) < self.CATCH_SPEED:
            wanted = -self.gain @ np.array([x, angle, speed, omega])
        else:
            energy = 0.5 * omega**2 / self._frequency_squared + cosine - 1
            pull = self.PULL[0] * x + self.PULL[1] * speed
            wanted = np.array([self._pumping * energy * np.sign(omega * cosine) - pull])
        return np.clip(wanted + self._sigma * random.standard_normal(1), -1.0, 1.0)


def cartpole(env: Environment) -> DMControlEnv:
    """Return ``env``, or raise ``ArgumentError`` unless it is a cart-pole of dm_control."""
    if not isinstance(env, DMControlEnv) or not is_cartpole(env.task):
        raise ArgumentError(
            f"controllers names swingup, which drives the cart-pole alone, and {env.name} is none; leave controllers out, "
            "or give controllers={random: 1.0}"
        )
    return env


def is_cartpole(task: str) -> bool:
    """Return whether the name of a task is that of a cart-pole of dm_control."""
    return task.startswith("cartpole-")


def check_range(name: str, values: Sequence[float]) -> None:
    """Raise ``ArgumentError`` unless ``values`` is ``(low, high)`` with 0 <= low <= high."""
    if len(values) != 2 or not 0 <= values[0] <= values[1] < math.inf:
        raise ArgumentError(f"{name} is {list(values)}; give [low, high] with 0 <= low <= high")


def linearise(env: DMControlEnv, state: Array, *, size: float = 1e-4) -> tuple[Array, Array]:
    """Return ``A [n, n]`` and ``B [n, action_dim]`` of one agent step by central differences at ``state [n]`` and zero action."""
    rest = np.zeros(env.action_dim)
    by_state = [(env.transition(state + d, rest) - env.transition(state - d, rest)) / (2 * size) for d in size * np.eye(len(state))]
    by_action = [(env.transition(state, d) - env.transition(state, -d)) / (2 * size) for d in size * np.eye(env.action_dim)]
    return np.stack(by_state, axis=1), np.stack(by_action, axis=1)


def lqr_gain(a: Array, b: Array, state_cost: Array, action_cost: Array, *, iterations: int = 10_000, tolerance: float = 1e-12) -> Array:
    """Return the gain ``K [m, n]`` of ``u = -K x`` that minimises the sum of x'Qx + u'Ru for x <- A x + B u, by Riccati iteration.

    Raises:
        ArgumentError: The iteration does not converge, as for a system that no action can stabilise.
    """
    value = state_cost
    for _ in range(iterations):
        gain = np.linalg.solve(action_cost + b.T @ value @ b, b.T @ value @ a)
        after = state_cost + a.T @ value @ (a - b @ gain)
        if np.abs(after - value).max() <= tolerance * np.abs(after).max():
            return gain
        value = after
    raise ArgumentError(f"the Riccati equation did not settle in {iterations} iterations; the system cannot be stabilised by its actions")


def _pole_frequency_squared(env: DMControlEnv) -> float:
    """Return m g l / J of the pole about its hinge in 1/s^2, from the simulator's model."""
    model = env.physics.named.model
    mass, arm = float(model.body_mass["pole_1"]), float(np.linalg.norm(model.body_ipos["pole_1"]))
    inertia = float(model.body_inertia["pole_1"][0]) + mass * arm**2  # across the pole, moved to the hinge
    return mass * float(np.linalg.norm(env.physics.model.opt.gravity)) * arm / inertia
