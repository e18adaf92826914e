"""Environments of gymnasium as ours and ours as theirs: same numbers, absorbing ends, spaces that cannot be used."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from tests.pwm.envs.points import Point
from ttcfast.pwm.envs import EnvPool, GymnasiumEnv, PaddedEnv, as_gymnasium, make_env
from ttcfast.runtime.errors import ArgumentError, MissingPackageError

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed; pip install 'ttcfast[gym]' brings it")
Box = gymnasium.spaces.Box


class Tank(gymnasium.Env):
    """Counts its steps; a level that the first action sets, and an end after ``ends`` steps."""

    def __init__(self, ends: int = 10**6, observation: Any = None, action: Any = None) -> None:
        self.observation_space = gymnasium.spaces.Dict({"level": Box(0, 9, (1, 2)), "clock": Box(0, 255, (1,), np.uint8)})
        self.observation_space = observation or self.observation_space
        self.action_space = action or Box(np.array([[0.0], [-4.0]], np.float32), np.array([[9.0], [4.0]], np.float32))
        self._ends = ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.level = 0, self.np_random.uniform(0, 9, (1, 2)).astype(np.float32)
        return self.observe(), {}

    def step(self, action):
        assert self.t < self._ends and self.action_space.contains(action)
        self.t, self.level = self.t + 1, np.array(action, np.float32).reshape(1, 2)
        return self.observe(), float(self.t), self.t == self._ends, False, {}

    def observe(self):
        return {"level": self.level, "clock": np.array([self.t], np.uint8)}


def test_a_registered_environment_is_the_one_of_gymnasium():
    env, theirs = GymnasiumEnv("Pendulum-v1"), gymnasium.make("Pendulum-v1")
    assert (env.name, env.observation_dim, env.action_dim, env.episode_length) == ("gymnasium:Pendulum-v1", 3, 1, 200)
    assert np.array_equal(env.reset(3), theirs.reset(seed=3)[0])
    for t in range(200):
        a = np.sin(np.array([t]))
        observation, reward, over = env.step(a)
        wanted, earned, *_ = theirs.step((2 * a).astype(np.float32))  # torques reach from -2 to 2
        assert np.array_equal(observation, wanted) and reward == pytest.approx(earned) and over == (t == 199)
        assert observation.dtype == np.float32
    with pytest.raises(ArgumentError, match=r"the episode of 200 steps is over; call reset\(seed\)"):
        env.step(a)
    assert np.array_equal(env.reset(3), theirs.reset(seed=3)[0]) and not np.array_equal(env.reset(4), theirs.reset(seed=3)[0])


def test_observations_are_flat_and_actions_scaled_to_their_bounds_and_shape():
    env = GymnasiumEnv(Tank(), episode_length=7)
    assert (env.name, env.observation_dim, env.action_dim) == ("gymnasium:Tank", 3, 2)
    assert env.reset(0)[0] == 0, "keys of a Dict are in gymnasium's order, the alphabet's"
    assert env.step(np.array([-1.0, 1.0]))[0].tolist() == [1, 0, 4]
    assert env.step(np.array([1.0, -0.5]))[0].tolist() == [2, 9, -2]


def test_actions_are_repeated_and_rewards_added():
    env = GymnasiumEnv(Tank(), episode_length=2, action_repeat=3)
    env.reset(0)
    assert [env.step(np.zeros(2))[1:] for _ in range(2)] == [(1 + 2 + 3, False), (4 + 5 + 6, True)]
    assert make_env("gymnasium:Pendulum-v1").episode_length == 100


def test_an_end_is_an_absorbing_state():
    env = GymnasiumEnv(Tank(ends=5), episode_length=6, action_repeat=2)
    for _ in range(2):
        env.reset(0)
        steps = [env.step(np.full(2, t / 10)) for t in range(6)]
        assert [reward for _, reward, _ in steps] == [1 + 2, 3 + 4, 5, 0, 0, 0]
        assert [over for *_, over in steps] == [False] * 5 + [True]
        assert all(np.array_equal(observation, steps[2][0]) for observation, *_ in steps[3:]) and steps[2][0][0] == 5
        assert not np.array_equal(steps[1][0], steps[2][0])
    pool = EnvPool([lambda ends=ends: PaddedEnv(GymnasiumEnv(Tank(ends=ends), episode_length=6), 4, 2) for ends in (2, 9)])
    pool.reset([0, 0])
    assert pool.terminated == set()
    ends = []
    for _ in range(3):
        pool.step(np.zeros((2, 2)))
        ends.append(pool.terminated)
    assert ends == [set(), {0}, {0}]
    pool.reset([1], at=[0])
    assert pool.terminated == set()


def test_an_episode_can_be_longer_than_registered_but_not_longer_than_its_limit():
    env = GymnasiumEnv("Pendulum-v1", episode_length=250)
    env.reset(0)
    assert [env.step(np.zeros(1))[2] for _ in range(250)] == [False] * 249 + [True]
    env = GymnasiumEnv(gymnasium.wrappers.TimeLimit(Tank(), 3), episode_length=5)
    env.reset(0)
    with pytest.raises(ArgumentError, match="gymnasium:Tank truncated its episode at agent step 3; give a smaller episode_length"):
        [env.step(np.zeros(2)) for _ in range(5)]


def test_ours_passes_gymnasiums_own_check_and_comes_back_the_same():
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about observations without bounds
        check_env(as_gymnasium(Point()))
    theirs, point = as_gymnasium(Point()), Point()
    back, direct = GymnasiumEnv(theirs, episode_length=5), point
    first = back.reset(4)
    theirs.reset(seed=4)
    assert first[1] == 0 and (back.observation_dim, back.action_dim) == (2, 1)
    direct.reset(0)
    direct._x = float(first[0])
    back.reset(4)
    for t in range(5):
        found, wanted = back.step(np.array([0.5 - t / 5])), direct.step(np.array([0.5 - t / 5]))
        assert found[0] == pytest.approx(wanted[0], abs=1e-6) and found[1] == pytest.approx(wanted[1], abs=1e-6) and found[2] == (t == 4)


Discrete = gymnasium.spaces.Discrete(3)


def tank(**spaces: Any) -> GymnasiumEnv:
    return GymnasiumEnv(Tank(**spaces), episode_length=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GymnasiumEnv("CartPole-v1"), r"action_space of gymnasium:CartPole-v1 is Discrete\(2\); only Box actions"),
        (
            lambda: GymnasiumEnv(Tank(observation=Discrete), episode_length=1),
            r"observation_space of gymnasium:Tank is Discrete\(3\); only Box",
        ),
        (
            lambda: tank(observation=gymnasium.spaces.Dict(a=Box(0, 1), b=Discrete)),
            r"observation_space\['b'\] of gymnasium:Tank is Discrete\(3\)",
        ),
        (lambda: tank(action=Box(-np.inf, 1, (2,))), "must be floating-point numbers with finite bounds"),
        (
            lambda: GymnasiumEnv(Tank(action=Box(0, 5, (2,), np.int64)), episode_length=1),
            "must be floating-point numbers with finite bounds",
        ),
        (lambda: GymnasiumEnv(Tank()), "episode_length is None and gymnasium:Tank has no registered limit of steps; give episode_length"),
        (lambda: GymnasiumEnv("Pendulum-v1", action_repeat=3), "action_repeat is 3; it must divide the 200 steps"),
        (lambda: GymnasiumEnv("Nope-v1"), "gymnasium has no environment Nope-v1"),
        (lambda: make_env("gymnasium:Nope-v1"), "gymnasium has no environment Nope-v1"),
        (lambda: make_env("gymnasium:"), "task is 'gymnasium:'; it must be one of .* and a name registered with gymnasium"),
        (lambda: make_env("cartpole"), "task is 'cartpole'; it must be one of 'walker-stand', .*'cartpole-swingup'"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("action", "message"),
    [(np.zeros(3), r"action has shape \(3,\); gymnasium:Tank takes \(2,\)"), (np.array([0, np.nan]), r"must lie in \[-1, 1\]")],
)
def test_a_wrong_action_is_named(action, message):
    env = GymnasiumEnv(Tank(), episode_length=2)
    env.reset(0)
    with pytest.raises(ArgumentError, match=message):
        env.step(action)


def test_a_package_that_an_environment_needs_is_told(monkeypatch):
    def make(name, **options):
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed")

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(MissingPackageError, match=r"BipedalWalker-v3 of gymnasium needs a package .*Box2D"):
        make_env("gymnasium:BipedalWalker-v3")
