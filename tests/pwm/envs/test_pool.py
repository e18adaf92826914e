"""Pools and rollouts: one result for any number of processes, failing simulators and killed workers, errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch

from tests.pwm.envs.points import Point, Wide, unmakeable
from tests.simulators import needs_dm_control
from tests.test_import_cost import loaded_by
from ttcfast.pwm.envs import DMControlEnv, EnvPool, PaddedEnv
from ttcfast.pwm.envs.rollouts import rollouts
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.workers import WorkerError


def keyed(obs: torch.Tensor, step: int, episodes: torch.Tensor) -> torch.Tensor:
    """Actions of each row's own observation, step and episode."""
    return torch.stack([torch.sin(o.sum() + step + e) for o, e in zip(obs, episodes)])[:, None]


@pytest.fixture(scope="module")
def workers():
    """Three points in two workers, the second of which fails where seeds say."""
    with EnvPool([partial(Point, fails="raise", seeds=(11,))] * 3, processes=2) as pool:
        yield pool


def test_a_pool_does_what_its_environments_do():
    alone, pool = [Point(), Point(steps=4)], EnvPool([Point, partial(Point, steps=4)])
    observations = pool.reset([1, 2])
    assert np.array_equal(observations, np.stack([alone[0].reset(1), alone[1].reset(2)])) and observations.dtype == np.float32
    assert (len(pool), pool.names, pool.observation_dim, pool.action_dim, pool.episode_length) == (2, ["point", "point"], 2, 1, 5)
    for t in range(4):
        actions = np.array([[0.3], [-0.7]]) * (t + 1) / 4
        found, wanted = pool.step(actions), [env.step(a) for env, a in zip(alone, actions)]
        for values, one in zip(found, zip(*wanted)):
            assert np.array_equal(values, np.stack(one))
    assert found[2].tolist() == [False, True]
    assert pool.step(np.zeros((1, 1)), at=[0])[0].shape == (1, 2)


def test_rollouts_are_the_same_for_any_pool(workers):
    seeds = [3, 1, 4, 15, 9]
    results = [rollouts(pool, keyed, seeds) for pool in (EnvPool([Point]), EnvPool([Point] * 4), workers)]
    for other in results[1:]:
        assert torch.equal(results[0].returns, other.returns)
        for a, b in zip(results[0].kept(), other.kept(), strict=True):
            assert torch.equal(a.obs, b.obs) and torch.equal(a.act, b.act) and torch.equal(a.rew, b.rew)


def test_an_episode_holds_what_happened():
    result = rollouts(EnvPool([Point] * 2), keyed, [5, 6, 7], task=4)
    for i, episode in enumerate(result.kept()):
        env = Point()
        assert np.array_equal(env.reset(5 + i), episode.obs[0])
        for t in range(5):
            assert episode.act[t] == keyed(episode.obs[None, t], t, torch.tensor([i]))[0]
            observation, reward, _ = env.step(episode.act[t].numpy())
            assert np.array_equal(observation, episode.obs[t + 1]) and reward == pytest.approx(float(episode.rew[t]))
        assert episode.task == 4 and float(result.returns[i]) == pytest.approx(float(episode.rew.sum()))


@pytest.mark.parametrize(
    ("fails", "at", "reason"),
    [
        ("raise", 3, "point raised FloatingPointError: the simulation blew up, at step 2"),
        ("raise", 0, "blew up, at the reset"),
        ("nan", 2, "point returned an observation that is not finite, at step 1"),
        ("inf reward", 5, "point returned a reward that is not finite, at step 4"),
        ("shape", 1, "an observation of shape (3,), not (2,), at step 0"),
        ("endless", 0, "point did not end after 5 steps"),
    ],
)
def test_an_episode_whose_simulator_fails_is_dropped_whole_and_the_others_go_on(fails, at, reason):
    pool = EnvPool([partial(Point, fails=fails, seeds=(11,), at=at)] * 2)
    result, sound = rollouts(pool, keyed, [10, 11, 12, 13]), rollouts(EnvPool([Point]), keyed, [10, 99, 12, 13])
    assert [e is None for e in result.episodes] == [False, True, False, False] and result.failed == 1
    assert list(result.failures) == [1]
    assert result.failures[1].endswith(reason)
    assert result.returns.isnan().tolist() == [False, True, False, False]
    for i in (0, 2, 3):
        assert torch.equal(result.episodes[i].obs, sound.episodes[i].obs)


def test_a_failure_in_a_worker_is_told_as_here(workers):
    assert rollouts(workers, keyed, [10, 11, 12, 13]).failures == {1: "point raised FloatingPointError: the simulation blew up, at step 2"}


def test_a_killed_worker_is_named_and_the_others_are_ended():
    others = set(multiprocessing.active_children())
    pool = EnvPool([Point] * 3, processes=2)
    ours = set(multiprocessing.active_children()) - others
    pool.reset([0, 1, 2])
    os.kill(next(p.pid for p in ours if p.name == "ttcfast worker 2 of 2"), signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"worker 2 of 2 \(process \d+, environments 1 to 2\) was killed by signal 9; the others were ended"
    ):
        for _ in range(3):  # the first request may reach a process that is about to end
            pool.step(np.zeros((3, 1)))
    assert len(ours) == 2 and not ours & set(multiprocessing.active_children())
    with pytest.raises(ArgumentError, match="the pool is closed"):
        pool.reset([0, 1, 2])


def test_a_worker_that_ends_itself_is_named():
    with (
        EnvPool([partial(Point, fails="exit", seeds=(1,), at=1)], processes=4) as pool,
        pytest.raises(WorkerError, match=r"worker 1 of 1 \(process \d+, environment 0\) ended with status 7"),
    ):
        rollouts(pool, keyed, [0, 1])


def test_what_cannot_be_made_or_sent_is_told():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: no such thing"):
        EnvPool([Point, unmakeable], processes=2)
    with pytest.raises(ZeroDivisionError):
        EnvPool([unmakeable])
    with pytest.raises(ArgumentError, match=r"makers\[1\] cannot be sent to a worker process .*functools.partial"):
        EnvPool([Point, lambda: Point()], processes=1)
    with pytest.raises(ArgumentError, match="makers is empty"):
        EnvPool([])
    with pytest.raises(ArgumentError, match=r"wide has observations and actions of sizes \(3, 1\), point of \(2, 1\)"):
        EnvPool([Point, Wide])
    with pytest.raises(ValueError, match="processes is -1"):
        EnvPool([Point], processes=-1)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 1)), r"actions have shape \(2, 1\); expected \(3, 1\)"),
        (np.array([[0], [np.nan], [0]]), r"actions of environment 1 are \[nan\]"),
        (np.array([[0], [0], [1.5]]), r"actions of environment 2 are \[1.5\]; every entry must lie in \[-1, 1\]: clip it"),
    ],
)
def test_wrong_actions_are_named_and_the_pool_goes_on(workers, actions, message):
    workers.reset([0, 1, 2])
    with pytest.raises(ArgumentError, match=message):
        workers.step(actions)
    assert workers.step(np.zeros((3, 1)))[0].shape == (3, 2)


def test_wrong_arguments_are_named(workers):
    with pytest.raises(ArgumentError, match="seeds has 2 entries for 3 environments"):
        workers.reset([0, 1])
    with pytest.raises(ArgumentError, match="seeds holds -1"):
        workers.reset([0, 1, -1])
    with pytest.raises(ArgumentError, match=r"at is \[0, 3\]; give numbers from 0 to 2"):
        workers.reset([0, 1], at=[0, 3])
    with pytest.raises(ArgumentError, match="seeds is empty"):
        rollouts(workers, keyed, [])
    with pytest.raises(ArgumentError, match=r"the policy's action is \[2.0\] at step 0; .*tanh"):
        rollouts(workers, lambda obs, step, episodes: torch.full((len(obs), 1), 2.0), [0])
    with pytest.raises(ArgumentError, match=r"the policy's actions have shape \(3, 2\) at step 0; expected \(3, 1\)"):
        rollouts(workers, lambda obs, step, episodes: obs, [0, 1, 2])


def test_a_padded_environment_is_the_same_one():
    env, padded = Point(), PaddedEnv(Point(), 5, 3)
    assert np.array_equal(padded.reset(2), [*env.reset(2), 0, 0, 0])
    found, wanted = padded.step(np.array([0.5, -1.0, 1.0])), env.step(np.array([0.5]))
    assert np.array_equal(found[0], [*wanted[0], 0, 0, 0]) and found[1:] == wanted[1:]
    with pytest.raises(ArgumentError, match=r"action has shape \(1,\); point, padded, takes \(3,\)"):
        padded.step(np.zeros(1))
    with pytest.raises(ArgumentError, match="observation_dim is 1; point has 2"):
        PaddedEnv(env, 1, 1)


def test_workers_need_no_torch():
    assert loaded_by("import ttcfast.pwm.envs.pool", {"torch"}) == []


@needs_dm_control
def test_dm_control_in_workers_gives_the_same_bits():
    makers = [partial(DMControlEnv, "cartpole-swingup", action_repeat=20)] * 2
    here = rollouts(EnvPool(makers), lambda o, t, e: torch.sin(e + t)[:, None], [1, 2, 3])
    with EnvPool(makers, processes=2) as pool:
        there = rollouts(pool, lambda o, t, e: torch.sin(e + t)[:, None], [1, 2, 3])
    assert len(here.kept()) == 3 and torch.equal(here.returns, there.returns)
    assert all(torch.equal(a.obs, b.obs) for a, b in zip(here.kept(), there.kept()))
