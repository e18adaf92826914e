"""Actor and critic: gradients against finite differences, targets against their definition, what skips, and that it learns."""

from __future__ import annotations

import time

import pytest
import torch

from tests.pwm.cartpole import CartPole, hanging, states
from tests.pwm.small_models import small
from ttcfast.pwm.algorithms.actor_critic import ActorCritic, AgentConfig, Imagined
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel, ResidualWorldModel

SMALL = {"actor": {"units": [16]}, "critic": {"units": [16], "members": 2}, "critic_passes": 1, "horizon": 5}


def agent(model=None, seed: int = 0, **changes) -> ActorCritic:
    torch.manual_seed(seed)
    found = ActorCritic(model or CartPole(), AgentConfig(**{**SMALL, **changes}), reward_scale=2.0, seed=seed)
    with torch.no_grad():  # the untrained policy acts with mean 0, whose gradient passes the last layer alone
        for p in found.actor.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return found


def some_states(count: int, seed: int = 0) -> torch.Tensor:
    return states(2 * torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) - 1)


@pytest.mark.parametrize("kind", [None, MLPWorldModel, ResidualWorldModel, FlowWorldModel])
def test_the_actors_gradient_is_that_of_finite_differences(kind):
    model = None if kind is None else small(kind, encoder={"last_layer": "linear"}, latent_dim=5)
    found = agent(model, detach=False)
    if model is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    assert found.finite_difference_cosine(some_states(6), 3) > 1 - 1e-6


def test_detached_latents_bias_the_gradient():
    assert agent(detach=True).finite_difference_cosine(some_states(6), 3) < 1 - 1e-4


def test_updates_leave_the_world_model_as_it_is():
    model = small(ResidualWorldModel)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = agent(model)
    found.update(model.encode(torch.randn(8, 5)).detach(), 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_targets_are_the_lambda_returns_written_out():
    found = agent(gamma=0.9, trace=0.7)
    with torch.no_grad():
        rollout = found.imagine(some_states(3), found.noise(3, 0))
    values = found.target(rollout.latents).amin(0)
    rewards = rollout.rewards / found.unit
    horizon = len(rewards)
    for t in range(horizon):
        n_step = [
            sum(0.9**i * rewards[t + i] for i in range(n)) + 0.9**n * values[t + n] for n in range(1, horizon - t + 1)
        ]  # the returns of 1, 2, ... steps
        mixed = sum(0.3 * 0.7 ** (n - 1) * value for n, value in enumerate(n_step[:-1], 1)) + 0.7 ** (horizon - t - 1) * n_step[-1]
        torch.testing.assert_close(found.targets(rollout)[t], mixed)


def test_the_return_is_bootstrapped_once():
    found = agent(gamma=0.5, bootstrap="mean")
    rollout = Imagined(some_states(3).expand(6, 3, 5), torch.zeros(5, 3, 1), torch.ones(5, 3))
    value = found.value(rollout.latents[-1]) / found.unit
    expected = sum(0.5**t for t in range(5)) / found.unit + 0.5**5 * value
    torch.testing.assert_close(found.returns(rollout), expected)


def test_measurements_change_no_bit_of_the_run():
    z, one, two = some_states(8), agent(), agent()
    for step in range(3):
        if step == 1:
            two.measure_esnr(z, step, 4)
            two.finite_difference_cosine(z, step)
        assert one.update(z, step, progress=step / 3) == two.update(z, step, progress=step / 3)


def test_a_resumed_run_goes_on_with_the_same_bits():
    z, whole, first, second = some_states(8), agent(), agent(), agent(seed=1)
    second.seed = 0
    for step in range(4):
        whole.update(z, step)
    first.update(z, 0), first.update(z, 1)
    second.load_state_dict(first.state_dict())
    second.update(z, 2), second.update(z, 3)
    for one, two in zip(whole.modules().values(), second.modules().values()):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    found, z = agent(), some_states(8)
    before = [p.clone() for module in found.modules().values() for p in module.parameters()]
    z[0, 0] = torch.inf
    assert found.update(z, 0)["actor_updated"] == 0 and (found.skipped, found.skipped_in_a_row) == (1, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for module in found.modules().values() for p in module.parameters())))
    assert found.update(some_states(8), 1)["actor_updated"] == 1 and (found.skipped, found.skipped_in_a_row) == (1, 0)


def test_actions_that_the_task_lacks_are_masked():
    model = small(MLPWorldModel, action_dims=(2,))
    assert (agent(model).act(model.encode(torch.randn(4, 5)))[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": 1.0}, "gamma is 1; values of endless"),
        ({"gamma": 1.5}, "gamma is 1.5; it lies in"),
        ({"horizon": 0}, "horizon"),
        ({"bootstrap": "max"}, "bootstrap"),
        ({"actor": {"std": 0.1, "min_std": 0.2}}, "std is 0.1"),
        ({"critic": {"members": 0}}, "members is 0"),
        ({"critic": {"units": []}}, "units is empty"),
    ],
)
def test_settings_out_of_range_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        ActorCritic(CartPole(), AgentConfig(**changes))
    with pytest.raises(ValueError, match="reward_scale is 0"):
        ActorCritic(CartPole(), AgentConfig(), reward_scale=0)
    with pytest.raises(ValueError, match="microbatches is 3"):
        agent().measure_esnr(some_states(8), 0, 3)


@pytest.mark.slow
def test_the_agent_swings_up_an_exact_cart_pole():
    """At least 750 of 1000 within 30 seconds of processor time: what fails here is no fault of a world model."""
    model, updates = CartPole(), 400
    settings = {"actor": {"units": [64, 64]}, "critic": {"units": [64, 64], "members": 2}, "actor_lr": 2e-3, "critic_lr": 2e-3}
    settings |= {"lr_floor": 0.05, "critic_passes": 1, "target_rate": 0.05, "bootstrap": "mean", "detach": False}
    torch.manual_seed(0)
    found, draws = ActorCritic(model, AgentConfig(**settings), reward_scale=2.0), torch.Generator().manual_seed(0)
    started = time.process_time()
    for step in range(updates):
        if time.process_time() - started > 30:
            break
        found.update(states(2 * torch.rand(64, 4, generator=draws) - 1), step, progress=step / updates)
    z, total = hanging(torch.randn(8, 5, generator=draws)), torch.zeros(8)
    for _ in range(500):
        a = found.act(z)
        total, z = total + model.reward(z, a)[:, 0], model.next(z, a)
    assert float(total.mean()) >= 750
