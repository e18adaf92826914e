"""Exploring starts: over the whole range, reachable speeds, no overlapping bodies; actions that are held."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pwm.envs.points import Point
from tests.simulators import needs_dm_control
from ttcfast.pwm.envs import DMControlEnv
from ttcfast.pwm.envs.exploring import ExploringStarts, HeldController
from ttcfast.runtime.errors import ArgumentError

pytestmark = needs_dm_control


@pytest.fixture(scope="module")
def cartpole() -> ExploringStarts:
    return ExploringStarts(DMControlEnv("cartpole-swingup"))


def states(starts: ExploringStarts, count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.stack([(starts.reset(random), starts._env.state())[1] for _ in range(count)])


def test_states_cover_rail_turn_and_the_speeds_of_a_falling_pole(cartpole):
    """From rest anywhere the pole falls at up to about twice its frequency of 3.9 rad/s; a cart under full force passes 3 m/s."""
    assert 3 < cartpole.speeds[0] < 6 and 6 < cartpole.speeds[1] < 12
    drawn = states(cartpole, 400)
    limits = np.array([1.8, np.pi, *cartpole.speeds])
    assert (np.abs(drawn) <= limits).all()
    for column, limit in zip(drawn.T, limits):
        counts, _ = np.histogram(column, bins=4, range=(-limit, limit))
        assert counts.min() > 70, "of 100 expected in each quarter"


def test_an_episode_goes_on_from_the_state_and_its_observation(cartpole):
    env, random = cartpole._env, np.random.default_rng(3)
    observation = cartpole.reset(random)
    x, angle, speed, omega = before = env.state()
    assert observation == pytest.approx([x, np.cos(angle), np.sin(angle), speed, omega], abs=1e-6)
    env.step(np.array([0.3]))
    after = env.state()
    assert env.transition(before, np.array([0.3])) == pytest.approx(after, rel=1e-9, abs=1e-12)


def test_a_state_depends_on_the_draw_alone(cartpole):
    first = states(cartpole, 3)
    cartpole._env.step(np.array([1.0]))
    assert np.array_equal(states(cartpole, 3), first)
    assert np.array_equal(states(ExploringStarts(DMControlEnv("cartpole-swingup"), cartpole.speeds), 3), first)


def test_bodies_do_not_start_inside_each_other_and_targets_are_the_tasks_own():
    starts = ExploringStarts(DMControlEnv("cheetah-run"), np.zeros(9))
    for _ in range(20):
        starts.reset(np.random.default_rng())
        contact = starts._env.physics.data.contact.dist[: starts._env.physics.data.ncon]
        assert contact.min(initial=0) > -1e-3
    reacher = ExploringStarts(DMControlEnv("reacher-easy"), np.zeros(2))
    targets = {tuple(reacher.reset(np.random.default_rng(i))[2:4] + reacher._env.physics.finger_to_target()) for i in range(3)}
    assert len(targets) == 3


def test_joints_of_every_kind_are_drawn_over_their_range():
    fish = ExploringStarts(DMControlEnv("fish-swim"), np.zeros(13))
    drawn = states(fish, 100)
    assert np.linalg.norm(drawn[:, 3:7], axis=1) == pytest.approx(1) and (np.abs(drawn[:, 3:7].mean(0)) < 0.2).all()
    assert np.abs(drawn[:, 7:14]).max() <= 0.2, "servos hold tail and fins where the task puts them"
    walker = ExploringStarts(DMControlEnv("walker-walk"), np.zeros(9))
    drawn = states(walker, 100)
    limits = walker._env.physics.model.jnt_range
    assert (drawn[:, :2] == 0).all() and np.ptp(drawn[:, 2]) > 5
    assert ((drawn[:, 3:9] >= limits[3:, 0]) & (drawn[:, 3:9] <= limits[3:, 1])).all()
    assert (np.ptp(drawn[:, 3:9], axis=0) > 0.8 * np.ptp(limits[3:], axis=1)).all()


def test_actions_are_held_and_reach_their_limits():
    controller, random = HeldController(Point()), np.random.default_rng(0)
    controller.start(random)
    actions = np.array([controller.act(np.zeros(2), random)[0] for _ in range(3000)])
    lengths = np.diff(np.flatnonzero(np.diff(actions)))
    assert np.abs(actions).max() == 1 and 0.15 < (np.abs(actions) == 1).mean() < 0.3, "0.23 of [-1.3, 1.3] lies beyond"
    assert lengths.min() >= 1 and 5 < lengths.mean() < 8 and np.median(lengths) > 3


def test_an_environment_without_states_is_refused():
    with pytest.raises(ArgumentError, match="exploring starts set the simulator's state, which point does not allow; set exploring=0"):
        ExploringStarts(Point())
