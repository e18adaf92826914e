"""The scripted controllers: the swing-up does swing up and hold, noise spoils it by degrees, the gain is the optimal one."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import solve_discrete_are

from tests.simulators import needs_dm_control
from ttcfast.pwm.envs import Controller, DMControlEnv, RandomController, SwingUpController
from ttcfast.pwm.envs.controllers import linearise, lqr_gain
from ttcfast.runtime.errors import ArgumentError

pytestmark = needs_dm_control


@pytest.fixture(scope="module")
def env() -> DMControlEnv:
    return DMControlEnv("cartpole-swingup")


def episode(env: DMControlEnv, controller: Controller, seed: int) -> tuple[np.ndarray, float]:
    random = np.random.default_rng(seed)
    controller.start(random)
    observations, total, over = [env.reset(seed)], 0.0, False
    while not over:
        observation, reward, over = env.step(controller.act(observations[-1], random))
        observations.append(observation)
        total += reward
    return np.stack(observations), total


def test_the_pole_is_swung_up_and_held(env):
    observations, total = episode(env, SwingUpController(env, noise=(0, 0), pump=(0.8, 0.8)), 0)
    assert observations[0, 1] < -0.99, "it hangs at the start"
    held = observations[250:]
    assert held[:, 1].min() > 0.99 and np.abs(held[:, 0]).max() < 1.0
    assert np.abs(observations[:, 0]).max() < 2.0 and total > 800


def test_noise_spoils_it_by_degrees(env):
    returns = [np.mean([episode(env, SwingUpController(env, noise=(s, s)), seed)[1] for seed in range(2)]) for s in (0.0, 1.0, 2.0)]
    chance = np.mean([episode(env, RandomController(env), seed)[1] for seed in range(2)])
    assert returns[0] > 800 and returns[0] > returns[1] > returns[2] > chance and chance < 150


def test_settings_are_drawn_anew_for_each_episode_and_told(env):
    controller = SwingUpController(env, noise=(0.5, 1.5), pump=(0.7, 0.9))
    drawn = [controller.start(np.random.default_rng(seed)) for seed in (0, 1)]
    assert drawn[0] != drawn[1] and all(0.5 <= d["noise"] <= 1.5 and 0.7 <= d["pump"] <= 0.9 for d in drawn)


def test_the_gain_solves_the_riccati_equation(env):
    a, b = linearise(env, np.zeros(4))
    assert np.abs(np.linalg.eigvals(a)).max() > 1.05, "the upright rest is unstable"
    gain = lqr_gain(a, b, np.eye(4), np.eye(1))
    value = solve_discrete_are(a, b, np.eye(4), np.eye(1))
    assert gain == pytest.approx(np.linalg.solve(np.eye(1) + b.T @ value @ b, b.T @ value @ a), rel=1e-6)
    assert np.abs(np.linalg.eigvals(a - b @ gain)).max() < 1


def test_what_cannot_be_stabilised_is_told():
    with pytest.raises(ArgumentError, match="cannot be stabilised"):
        lqr_gain(2 * np.eye(2), np.zeros((2, 1)), np.eye(2), np.eye(1), iterations=100)


def test_wrong_settings_are_named(env):
    with pytest.raises(ArgumentError, match=r"noise is \[2, 1\]; give \[low, high\]"):
        SwingUpController(env, noise=(2, 1))
    with pytest.raises(ArgumentError, match="swingup, which drives the cart-pole alone, and cup-catch is none; leave controllers out"):
        SwingUpController(DMControlEnv("cup-catch"))
