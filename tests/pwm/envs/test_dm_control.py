"""The wrapper: sizes, repeats, fixed length, episodes that depend on their seed alone, errors."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.simulators import needs_dm_control
from ttcfast.pwm.envs import TASKS, DMControlEnv, PaddedEnv
from ttcfast.runtime.errors import ArgumentError

pytestmark = needs_dm_control


@pytest.fixture(scope="module")
def env() -> DMControlEnv:
    return DMControlEnv("cartpole-swingup")


def rollout(env: DMControlEnv, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    observations, rewards = [env.reset(seed)], []
    for _ in range(steps):
        observation, reward, _ = env.step(random.uniform(-1, 1, env.action_dim))
        observations.append(observation)
        rewards.append(reward)
    return np.stack(observations), np.array(rewards)


def test_an_episode_depends_on_its_seed_alone(env):
    first = rollout(env, 3, 40)
    other = rollout(env, 4, 40)
    again = rollout(env, 3, 40)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_an_action_is_repeated_and_its_rewards_are_added(env):
    single = DMControlEnv("cartpole-swingup", action_repeat=1)
    action = np.array([0.7])
    env.reset(0), single.reset(0)
    for _ in range(5):
        observation, reward, _ = env.step(action)
        parts = [single.step(action) for _ in range(2)]
        assert np.array_equal(observation, parts[1][0]) and reward == parts[0][1] + parts[1][1] and reward > 0


def test_the_episode_ends_after_its_length_and_not_before(env):
    env.reset(0)
    ends = [env.step(np.zeros(1))[2] for _ in range(env.episode_length)]
    assert env.episode_length == 500 and ends == [False] * 499 + [True]
    with pytest.raises(ArgumentError, match=r"the episode of 500 steps is over; call reset\(seed\)"):
        env.step(np.zeros(1))


def test_the_observation_is_position_cosine_sine_speeds(env):
    env.reset(0)
    observation, _, _ = env.step(np.array([1.0]))
    x, angle, speed, omega = env.state()
    assert observation.dtype == np.float32
    assert observation == pytest.approx([x, np.cos(angle), np.sin(angle), speed, omega], abs=1e-6)


def test_a_transition_is_what_a_step_does(env):
    env.reset(1)
    for _ in range(20):
        env.step(np.array([0.4]))
    before = env.state()
    env.step(np.array([-0.9]))
    after = env.state()
    assert env.transition(before, np.array([-0.9])) == pytest.approx(after, rel=1e-9, abs=1e-12)
    with pytest.raises(ArgumentError, match="is over"):
        env.step(np.zeros(1))


@pytest.mark.parametrize("task, observation_dim, action_dim", [("walker-walk", 24, 6), ("cup-catch", 8, 2), ("hopper-hop", 15, 4)])
def test_other_tasks_have_the_sizes_of_mt30(task, observation_dim, action_dim):
    env = DMControlEnv(task)
    assert (env.observation_dim, env.action_dim, env.episode_length) == (observation_dim, action_dim, 500)
    assert env.reset(0).shape == (observation_dim,)
    observation, reward, over = env.step(np.full(action_dim, -1.0))
    assert np.isfinite(observation).all() and 0 <= reward <= 2 and not over


# Sizes of observation and action in TD-MPC2's MT30.
SIZES = {
    **dict.fromkeys(("walker-stand", "walker-walk", "walker-run"), (24, 6)),
    **dict.fromkeys(("reacher-easy", "reacher-hard"), (6, 2)),
    **dict.fromkeys(("cartpole-balance", "cartpole-balance-sparse", "cartpole-swingup", "cartpole-swingup-sparse"), (5, 1)),
    **dict.fromkeys(("finger-turn-easy", "finger-turn-hard"), (12, 2)),
    **dict.fromkeys(("hopper-stand", "hopper-hop"), (15, 4)),
    "cheetah-run": (17, 6),
    "acrobot-swingup": (6, 1),
    "pendulum-swingup": (3, 1),
    "cup-catch": (8, 2),
    "finger-spin": (9, 2),
    "fish-swim": (24, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_task_plays_an_episode_as_padded_in_mt30(task):
    env = DMControlEnv(task)
    assert (env.observation_dim, env.action_dim, env.episode_length) == (*SIZES[task], 500)
    padded, random = PaddedEnv(env, 24, 6), np.random.default_rng(0)
    actions = random.uniform(-1, 1, (500, 6))
    results = []
    for filler in (0.0, 1.0):  # in the entries that the task does not have
        actions[:, env.action_dim :] = filler
        steps = [(padded.reset(5), 0.0, False), *(padded.step(a) for a in actions)]
        results.append([np.stack(column) for column in zip(*steps)])
    observations, rewards, over = results[0]
    assert all(np.array_equal(a, b) for a, b in zip(*results))
    assert observations.shape == (501, 24) and np.isfinite(observations).all() and not observations[:, env.observation_dim :].any()
    assert ((rewards >= 0) & (rewards <= 2)).all() and over.tolist() == [False] * 500 + [True]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(2), r"action has shape \(2,\); cartpole-swingup takes \(1,\)"),
        (np.array([1.5]), r"action is \[1.5\]; every entry must lie in \[-1, 1\]"),
        (np.array([np.nan]), r"action is \[nan\]"),
    ],
)
def test_a_wrong_action_is_named(env, action, message):
    env.reset(0)
    with pytest.raises(ArgumentError, match=message):
        env.step(action)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match=r"task is 'cartpole-swing'; it must be one of .*'cartpole-swingup'"):
        DMControlEnv("cartpole-swing")
    with pytest.raises(ValueError, match="action_repeat is 3; it must divide the 1000"):
        DMControlEnv("cartpole-swingup", action_repeat=3)


def test_no_display_is_asked_for():
    code = "from ttcfast.pwm.envs import DMControlEnv; import os; DMControlEnv('cartpole-swingup').reset(0); print(os.environ['MUJOCO_GL'])"
    clean = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY")}
    run = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["disabled"], run.stderr
