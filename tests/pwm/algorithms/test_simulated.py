"""Rollouts in the simulator with the model's gradient: where the model is exact, where it is wrong, ends, failures, resume."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from tests.pwm.cartpole import CartPole, CartPoleEnv
from tests.pwm.envs.points import Point
from tests.pwm.small_models import small, stirred
from ttcfast.pwm.algorithms.actor_critic import ActorCritic, AgentConfig
from ttcfast.pwm.algorithms.simulated import SimulatedEpisodes
from ttcfast.pwm.envs import EnvPool, PaddedEnv
from ttcfast.pwm.models import ResidualWorldModel
from ttcfast.runtime.errors import ArgumentError

SMALL = {"actor": {"units": [16]}, "critic": {"units": [16], "members": 2}, "critic_passes": 1, "horizon": 5, "detach": False}


class Weak(CartPole):
    """A wrong model: half the force, half the reward."""

    def next(self, z, a, task=None):
        return super().next(z, a / 2)

    def reward(self, z, a, task=None):
        return super().reward(z, a) / 2


def agent(model=None, **changes) -> ActorCritic:
    torch.manual_seed(0)
    found = ActorCritic(model or CartPole(), AgentConfig(**{**SMALL, **changes}), reward_scale=2.0)
    with torch.no_grad():
        for p in [*found.actor.parameters(), *found.critic.parameters(), *found.target.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
    return found


def of_points(**changes) -> ActorCritic:
    return agent(stirred(small(ResidualWorldModel, **{"observation_dim": 2, "action_dim": 1, "latent_dim": 8, **changes})))


def episodes(policy: ActorCritic, make=CartPoleEnv, count: int = 6, *, keep: bool = False, processes: int = 0) -> SimulatedEpisodes:
    return SimulatedEpisodes(EnvPool([make] * count, processes), policy, first_seed=100, keep=keep)


def play(policy: ActorCritic, played: SimulatedEpisodes, step: int = 0):
    z = played.starts()
    return played.rollout(z, policy.noise(len(z), step))


def gradient(policy: ActorCritic, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(policy.actor.parameters()), retain_graph=True)])


@pytest.mark.parametrize("detach", [False, True])
def test_an_exact_model_gives_the_gradient_of_imagination(detach):
    policy = agent(detach=detach)
    played = episodes(policy, partial(CartPoleEnv, steps=60))
    for step in range(2):  # the second goes on where the first has ended
        z, noise = played.starts(), policy.noise(6, step)
        ours, theirs = played.rollout(z, noise), policy.imagine(z, noise)
        torch.testing.assert_close(ours.latents, theirs.latents)
        ours, theirs = policy.actor_loss(ours), policy.actor_loss(theirs)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradient(policy, ours), gradient(policy, theirs), rtol=1e-5, atol=1e-6)
    assert played.steps == 6 * 10 and played.failed == 0


def test_values_are_the_simulators_and_jacobians_a_wrong_models():
    policy, true = agent(Weak(), detach=True), CartPole()
    played = episodes(policy, count=3)
    z = played.starts()
    rollout = played.rollout(z, policy.noise(3, 0))
    actions, latents, rewards = rollout.actions.detach(), [z], []
    for a in actions:
        rewards.append(true.reward(latents[-1], a)[:, 0])
        latents.append(true.next(latents[-1], a))
    torch.testing.assert_close(rollout.latents.detach(), torch.stack(latents))
    torch.testing.assert_close(rollout.rewards.detach(), torch.stack(rewards))

    # The gradient by the adjoint, with Jacobians of the wrong model at the true states of one episode at a time.
    model, gamma, by_actions = policy.model, policy.config.gamma, torch.zeros(5, 3, 1)
    for b in range(3):
        adjoint = jacobian(lambda x: gamma**5 * policy.unit * policy.critic(x[None]).amin(0)[0], latents[5][b])
        for t in reversed(range(5)):
            at = latents[t][b], actions[t, b]
            next_by_state, next_by_action = jacobian(lambda x, a: model.next(x[None], a[None])[0], at)
            earned_by_state, earned_by_action = jacobian(lambda x, a: model.reward(x[None], a[None])[0, 0], at)
            by_actions[t, b] = gamma**t * earned_by_action + next_by_action.T @ adjoint
            adjoint = gamma**t * earned_by_state + next_by_state.T @ adjoint
    wanted = gradient(policy, -(rollout.actions * by_actions).sum((0, 2)).mean())
    torch.testing.assert_close(gradient(policy, policy.actor_loss(rollout)), wanted, rtol=1e-4, atol=1e-5)


def test_a_limit_of_steps_ends_a_rollout_with_the_value_of_its_last_state():
    policy, shorter = agent(horizon=8), agent(horizon=6)
    played = episodes(policy)  # of 6, 13, 20, 26, 33 and 40 steps
    z, noise = played.starts(), policy.noise(6, 0)
    rollout = played.rollout(z, noise)
    assert rollout.own.sum(0).tolist() == [6] + [8] * 5 and played.steps == 46
    first = rollout.each(lambda x: x[:, :1])
    expected = shorter.imagine(z[:1], noise[:6, :1])
    torch.testing.assert_close(policy.returns(first), shorter.returns(expected))
    torch.testing.assert_close(gradient(policy, policy.returns(first)), gradient(shorter, shorter.returns(expected)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(policy.targets(first)[:6], shorter.targets(expected))
    torch.testing.assert_close(played.starts()[0], torch.from_numpy(CartPoleEnv().reset(106)))
    torch.testing.assert_close(played.starts()[1], rollout.latents[-1, 1].detach())


def test_an_end_of_its_own_earns_nothing_more_and_passes_no_gradient():
    policy = agent()
    played = episodes(policy, partial(CartPoleEnv, ends=3), keep=True)
    z, noise = played.starts(), policy.noise(6, 0)
    rollout, imagined = played.rollout(z, noise), policy.imagine(z, noise)
    discounts = policy.config.gamma ** torch.arange(3.0)
    expected = discounts @ imagined.rewards[:3] / policy.unit
    torch.testing.assert_close(policy.returns(rollout), expected)
    ours, theirs = gradient(policy, policy.returns(rollout).sum()), gradient(policy, expected.sum())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.targets(rollout)[2], rollout.rewards[2].detach() / policy.unit)
    assert rollout.made(rollout.rewards).shape == (18,) and played.steps == 18
    for kept, first in zip(played.take(), z, strict=True):  # with the absorbing state, from which the world model learns the end
        assert torch.equal(kept.obs[0], first) and torch.equal(kept.obs[3], kept.obs[5]) and kept.rew[3:].tolist() == [0, 0]
    torch.testing.assert_close(played.starts()[0], torch.from_numpy(CartPoleEnv().reset(106)))


def test_what_is_kept_is_what_happened():
    policy = agent(horizon=8)
    played, env = episodes(policy, keep=True), CartPoleEnv()
    play(policy, played)
    kept = played.take()
    assert len(kept) == 5 and played.take() == []  # the first ends after 6 steps
    for seed, episode in zip(range(101, 106), kept):
        obs, rew = [env.reset(seed)], []
        for a in episode.act.numpy():
            observation, reward, _ = env.step(a)
            obs.append(observation), rew.append(reward)
        assert torch.equal(episode.obs, torch.from_numpy(np.stack(obs))) and torch.equal(episode.rew, torch.tensor(rew))


def test_a_rollout_whose_simulator_fails_is_dropped_and_counted():
    policy = agent()
    played = episodes(policy, partial(CartPoleEnv, fails=(101,)), keep=True)
    whole, rest = play(policy, episodes(policy)), play(policy, played)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(rest.latents, whole.latents[:, others]) and torch.equal(rest.rewards, whole.rewards[:, others])
    assert played.failed == 1 and played.steps == 28 and len(played.take()) == 5
    torch.testing.assert_close(played.starts()[1], torch.from_numpy(CartPoleEnv().reset(106)))


def test_an_update_without_any_rollout_is_skipped():
    policy = of_points()
    played = episodes(policy, partial(Point, fails="raise", seeds=tuple(range(100, 106)), at=0))
    found = policy.update(played.starts(), 0, imagine=partial(played.rollout, microbatches=2))
    assert (found["actor_updated"], played.failed, played.steps, played.esnr) == (0, 6, 0, None)
    assert policy.update(played.starts(), 1, imagine=played.rollout)["actor_updated"] == 1 and played.steps == 6 * 5


@pytest.mark.parametrize("processes", [0, 2])
def test_a_resumed_run_goes_on_with_the_same_bits(processes):
    policy = of_points()
    make = partial(Point, steps=11, fails="nan", seeds=(103, 108), at=7)
    whole, again = (episodes(policy, make, 4, keep=True, processes=p) for p in (0, processes))
    for step in range(2):
        play(policy, whole, step)
    again.load_state_dict(whole.state_dict())
    for step in range(2, 6):
        one, two = play(policy, whole, step), play(policy, again, step)
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert (whole.steps, whole.failed) == (again.steps, again.failed) and whole.failed == 2
    assert all(torch.equal(a.obs, b.obs) and torch.equal(a.rew, b.rew) for a, b in zip(whole.take(), again.take(), strict=True))
    again.pool.close()


def test_a_simulator_that_does_not_repeat_itself_is_told_of(caplog):
    policy = of_points()
    whole = episodes(policy, partial(Point, steps=20))
    play(policy, whole)
    with caplog.at_level(logging.WARNING):
        episodes(policy, partial(Point, steps=20)).load_state_dict(whole.state_dict())
        assert not caplog.records
        whole._seeds += 1
        episodes(policy, partial(Point, steps=20)).load_state_dict(whole.state_dict())
    assert "point does not repeat its episodes" in caplog.text


def test_padding_is_masked():
    policy = of_points(observation_dim=4, action_dim=3, action_dims=(1,))
    played = episodes(policy, lambda: PaddedEnv(Point(), 4, 3), keep=True)
    rollout = play(policy, played)
    assert (rollout.actions[..., 1:] != 0).any() and all((e.act[:, 1:] == 0).all() and (e.obs[:, 2:] == 0).all() for e in played.take())
    policy.actor_loss(rollout).backward()
    assert policy.actor.log_std.grad[0] != 0 and policy.actor.log_std.grad[1:].tolist() == [0, 0]


def test_esnr_is_that_of_groups_of_rollouts():
    policy = agent()
    played = episodes(policy)
    z, noise = played.starts(), policy.noise(6, 0)
    rollout = played.rollout(z, noise, microbatches=3)
    groups = torch.stack([gradient(policy, policy.actor_loss(rollout.each(lambda x, i=i: x[:, i : i + 2]))) for i in (0, 2, 4)]).double()
    mean = groups.mean(0)
    assert played.esnr.raw == pytest.approx(float(mean.square().sum() / (groups - mean).square().sum(1).mean()), rel=1e-4)
    assert play(policy, played, 1) is not None and played.esnr is None


def test_a_horizon_beyond_the_episodes_is_told():
    with pytest.raises(ArgumentError, match=r"agent.horizon is 5; an episode of point has 3 steps: give at most that"):
        episodes(of_points(), partial(Point, steps=3))
