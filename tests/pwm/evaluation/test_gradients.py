"""Sensitivity of models whose Jacobians are known, and gradients against those of the simulator."""

from __future__ import annotations

import math

import pytest
import torch

from tests.pwm.cartpole import UNITS, CartPole, CartPoleEnv
from tests.pwm.envs.points import Point
from tests.pwm.small_models import batch, small, stirred
from tests.simulators import needs_dm_control
from ttcfast.data.episodes import Episode
from ttcfast.pwm.envs import DMControlEnv, PaddedEnv
from ttcfast.pwm.evaluation.gradients import beside_simulator, model_gradient, sensitivity, settable, simulator_cosine
from ttcfast.pwm.models import FlowWorldModel, ResidualWorldModel
from ttcfast.spec import Key


def test_a_model_that_changes_nothing_has_an_identity_as_jacobian():
    model = small(ResidualWorldModel, encoder={"last_layer": "linear"})
    with torch.no_grad():
        for p in model.dynamics_network.last.parameters():
            p.zero_()
    found = sensitivity(model, *batch(4))
    assert found.dynamics == pytest.approx((1, 1)) and found.action == (0, 0) and found.reward == (0, 0)


def test_sensitivity_is_that_of_the_whole_jacobian():
    model = stirred(small(FlowWorldModel)).double()
    z, a = batch(3, dtype=torch.float64)
    found = sensitivity(model, z, a)
    norms = [
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda x, i=i: model.next(x[None], a[i : i + 1])[0], z[i]), 2)
        for i in range(3)
    ]
    assert found.dynamics == pytest.approx((float(sum(norms) / 3), float(max(norms))))
    assert all(p.requires_grad for p in model.parameters())


class Exact:
    """The cart-pole in closed form as an agent that swings left and right."""

    gamma, policy = 0.99, None

    def __init__(self) -> None:
        self.model = CartPole()
        self.model.encode = lambda obs, task=None: obs.float() / UNITS

    def rollout(self, z, act, task=None):
        latents = [z]
        for a in act:
            latents.append(self.model.next(latents[-1], a))
        return torch.stack(latents)

    def act(self, obs):
        return torch.sin(3 * obs[:, :1] + obs[:, 4:])


@needs_dm_control
def test_gradients_of_an_exact_model_are_the_simulators():
    ours, theirs = beside_simulator(Exact(), DMControlEnv("cartpole-swingup"), seed=3, horizon=8, every=120)
    cosines = torch.nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1))
    assert len(cosines) == 5 and float(cosines.median()) > 0.99 and float(cosines.min()) > 0.9  # the last differ at the end of the rail


def test_the_model_gradient_is_that_of_its_return():
    agent, obs = Exact(), torch.tensor([0.1, -0.9, 0.4, 0.2, 0.5])
    actions = torch.tensor([[0.2], [-0.4], [0.1]])
    found = model_gradient(agent, obs, actions, 0.9)

    def value(x):
        z, total = agent.model.encode(obs[None]), 0.0
        for t, a in enumerate(x):
            total, z = total + 0.9**t * agent.model.reward(z, a[None])[0, 0], agent.model.next(z, a[None])
        return total

    for t in range(3):
        step = torch.zeros(3, 1)
        step[t] = 1e-2
        assert float(found[t]) == pytest.approx(float(value(actions + step) - value(actions - step)) / 2e-2, abs=2e-3)


class Aimed(CartPoleEnv):
    """A cart-pole whose reward has a sign that the reset draws: that of even random seeds is positive."""

    def step(self, action):
        observation, reward, over = super().step(action)
        return observation, reward * (1 - 2 * (self._seed % 2)), over


class Guess:
    """The cart-pole in closed form as an agent, its rewards times ``sign``."""

    def __init__(self, sign: float = 1.0) -> None:
        self.model = CartPole()
        self.model.reward = lambda z, a, task=None: sign * CartPole.reward(self.model, z, a)

    policy, rollout = None, Exact.rollout


def played(env, seed: int, steps: int = 30) -> Episode:
    obs, act = [torch.from_numpy(env.reset(seed))], torch.sin(torch.arange(float(steps)))[:, None]
    obs += [torch.from_numpy(env.step(a)[0]) for a in act.numpy()]
    return Episode(torch.stack(obs), act, torch.zeros(steps))


def cosine(agent, env, episode, seed, **changes) -> float:
    settings = {"horizon": 8, "gamma": 0.99, "key": Key(0, 0, 5), "directions": 3}
    return simulator_cosine(agent, env, episode, [0, 7, 22], seed=seed, **{**settings, **changes})


def test_the_cosine_with_the_simulator_is_1_for_an_exact_model_and_has_its_sign():
    env = CartPoleEnv()
    episode = played(env, 3)
    assert cosine(Guess(), env, episode, 3) > 0.999 and cosine(Guess(-1.0), env, episode, 3) < -0.999
    assert math.isnan(cosine(Guess(0.0), env, episode, 3))


def test_what_a_reset_draws_beside_the_state_is_that_of_the_episode():
    env = Aimed()
    for seed, sign in ((2, 1), (3, -1)):
        assert cosine(Guess(), env, played(env, seed), seed) * sign > 0.999


def test_the_cosine_is_that_of_whole_gradients():
    env, episode = CartPoleEnv(), played(CartPoleEnv(), 3)
    wrong = Guess()
    wrong.model.next = lambda z, a, task=None: CartPole.next(wrong.model, z, torch.sin(4 * a))
    ours, theirs = [], []
    for t in (0, 7, 22):
        for agent, found in ((wrong, ours), (Guess(), theirs)):
            found.append(model_gradient(agent, episode.obs[t], episode.act[t : t + 8], 0.99))
    expected = float(torch.nn.functional.cosine_similarity(torch.cat(ours).flatten(), torch.cat(theirs).flatten(), dim=0))
    assert 0.3 < expected < 0.98
    assert cosine(wrong, env, episode, 3, directions=200) == pytest.approx(expected, abs=0.05)


def test_simulators_that_fail_or_have_no_state_give_no_cosine():
    assert settable(PaddedEnv(Point(), 3, 2)) is None and isinstance(settable(PaddedEnv(CartPoleEnv(), 6, 2)), CartPoleEnv)
    assert math.isnan(cosine(Guess(), CartPoleEnv(fails=(3,)), played(CartPoleEnv(), 3), 3))
