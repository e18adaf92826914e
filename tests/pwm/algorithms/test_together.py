"""Several agents trained together: each ends with the bits of its own training, whatever the others do."""

from __future__ import annotations

import pytest
import torch

from tests.pwm.small_models import small
from ttcfast.integrators import Heun
from ttcfast.pwm.algorithms import PWM
from ttcfast.pwm.algorithms.actor_critic import AgentConfig
from ttcfast.pwm.algorithms.sanity import SanityChecks
from ttcfast.pwm.algorithms.together import RandomStream, Together, can_stack
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel, ResidualWorldModel

KINDS = {"mlp": MLPWorldModel, "residual": ResidualWorldModel, "flow": FlowWorldModel}
SEEDS, HORIZON, BATCH = (3, 4, 7), 3, 20


def agent(kind: str, seed: int, clip: float = 20.0, **changes) -> PWM:
    torch.manual_seed(seed)
    more = {"integrator": Heun(2)} if kind == "flow" else {}
    model = small(KINDS[kind], encoder={"last_layer": "linear"}, latent_dim=5, standardise=True, action_dims=(2,), **more)
    found = PWM(model, lr=3e-3, clip=clip, sanity=SanityChecks(patience=3))
    sizes = {"actor": {"units": [16]}, "critic": {"units": [16], "members": 2}, "critic_passes": 2, "horizon": 4}
    settings = {"actor_lr": 3e-3, "critic_lr": 1e-2, "target_rate": 0.1, "detach": False, "actor_clip": 0.05}
    found.add_policy(AgentConfig(**{**sizes, **settings, **changes}), reward_scale=2.0, seed=seed)
    with torch.no_grad():
        for p in (*found.model.parameters(), *found.policy.actor.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return found


def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1000 * seed + step)
    obs, act = torch.randn(HORIZON + 1, BATCH, 5, generator=draws), torch.rand(HORIZON, BATCH, 3, generator=draws) * 2 - 1
    return obs, act, torch.randn(HORIZON, BATCH, 1, generator=draws)


def weights(found: PWM) -> dict[str, torch.Tensor]:
    parts = {"model": found.model, **found.policy.modules()}
    return {f"{place}.{name}": t.clone() for place, part in parts.items() for name, t in part.state_dict().items()}


def alone(kind: str, seed: int, spoil, **changes) -> tuple[PWM, list[dict[str, float]]]:
    found, told = agent(kind, seed, **changes), []
    torch.manual_seed(100 + seed)  # flow matching draws its times
    for step in range(6):
        data = spoil(seed, step, batch(seed, step))
        told.append(found.update_wm(*data))
        told.append(found.update_policy(data[0][0], step, progress=step / 6))
    return found, told


def together(kind: str, spoil, **changes) -> tuple[list[PWM], list[list[dict[str, float]]]]:
    agents, streams, told = [], [], [[] for _ in SEEDS]
    for seed in SEEDS:
        agents.append(agent(kind, seed, **changes))
        torch.manual_seed(100 + seed)
        streams.append(RandomStream())
    torch.manual_seed(0)
    all_of_them = Together(agents, streams)
    for step in range(6):
        data = [spoil(seed, step, batch(seed, step)) for seed in SEEDS]
        obs, act, rew = (torch.stack(parts, 1) for parts in zip(*data))
        for found in (all_of_them.update_wm(obs, act, rew), all_of_them.update_policy(obs[0], step, progress=step / 6)):
            for own, one in zip(told, found):
                own.append(one)
    return agents, told


def as_they_are(seed, step, data):
    return data


def one_is_spoilt(seed, step, data):
    obs, act, rew = data
    if seed == SEEDS[1] and step in (2, 3):
        obs = obs.clone()
        obs[0, 0, 0] = float("inf")
    return obs, act, rew


@pytest.mark.parametrize("spoil", [as_they_are, one_is_spoilt])
@pytest.mark.parametrize("kind", KINDS)
def test_each_ends_with_the_bits_of_its_own_training(kind, spoil):
    agents, told = together(kind, spoil)
    for seed, one, said in zip(SEEDS, agents, told):
        expected, expected_said = alone(kind, seed, spoil)
        found = weights(one)
        for name, tensor in weights(expected).items():
            assert torch.equal(found[name], tensor), name
        for mine, theirs in zip(said, expected_said):
            assert mine.keys() == theirs.keys()
            assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-4, abs=1e-6, nan_ok=True)
        spoilt = 2 * (spoil is one_is_spoilt and seed == SEEDS[1])
        assert one.sanity.skipped == one.policy.skipped == spoilt
        assert one.sanity.counts["nan"] == spoilt


@pytest.mark.parametrize("changes", [{"detach": True}, {"bootstrap": "mean"}, {"clip": 1e-3, "critic_clip": 1e-3}], ids=str)
def test_with_other_settings(changes):
    agents, _ = together("residual", as_they_are, **changes)
    for seed, one in zip(SEEDS, agents):
        found, expected = weights(one), weights(alone("residual", seed, as_they_are, **changes)[0])
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_agent_goes_on_alone_afterwards():
    agents, _ = together("flow", as_they_are)
    expected = alone("flow", SEEDS[0], as_they_are)[0]
    for found in (agents[0], expected):
        torch.manual_seed(5)
        found.update_wm(*batch(0, 9))
        found.update_policy(batch(0, 9)[0][0], 9)
    mine, theirs = weights(agents[0]), weights(expected)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    others = [weights(found) for found in agents[1:]]
    assert all(not torch.equal(mine[name], other[name]) for other in others for name in ("actor.log_std", "critic.weights.0"))


def test_what_cannot_be_stacked_is_told():
    assert can_stack(agent("flow", 0)) and can_stack(agent("mlp", 0))
    assert not can_stack(PWM(small(MLPWorldModel)))  # ends in SimNorm
    assert not can_stack(PWM(small(FlowWorldModel, encoder={"last_layer": "linear"}, fused=False)))
    assert not can_stack(PWM(small(ResidualWorldModel, encoder={"last_layer": "linear"}, tasks=("a", "b"), multitask=True)))


def another_spread(found: PWM) -> None:
    found.model.set_observation_statistics(torch.zeros(5), torch.full((5,), 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: agent("mlp", 1), "differ in the class of the model: MLPWorldModel and FlowWorldModel"),
        (lambda: agent("flow", 1, clip=3.0), "differ in the settings of the world model's training"),
        (lambda: agent("flow", 1, gamma=0.9), "differ in the policy's settings"),
        (lambda: spoilt(agent("flow", 1), another_spread), "differ in the model's statistics"),
        (lambda: PWM(agent("flow", 1).model), r"agents\[1\] has no policy"),
        (lambda: spoilt(agent("flow", 1), lambda found: setattr(found.model, "fused", False)), r"agents\[1\] has several tasks, or"),
    ],
)
def test_agents_of_different_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        Together([agent("flow", 0), make()], [RandomStream(), RandomStream()])


def spoilt(found: PWM, change) -> PWM:
    change(found)
    return found
