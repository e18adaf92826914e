"""World models, policies inside them, plans and ESNR on the fake device: the numbers of the host, and one wait per update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.fake_cuda import FakeCuda, on_host
from tests.pwm.small_models import small, stirred
from ttcfast.pwm.algorithms import PWM, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from ttcfast.pwm.algorithms.actor_critic import AgentConfig
from ttcfast.pwm.algorithms.together import RandomStream, Together
from ttcfast.pwm.models import FlowWorldModel, MLPWorldModel, ResidualWorldModel
from ttcfast.pwm.planning import METHODS, Planner
from ttcfast.pwm.utils.metrics import ESNRMeter

H, B = 4, 6
MODELS = {
    "mlp": (MLPWorldModel, {}, MLPDynamicsLoss),
    "residual": (ResidualWorldModel, {"num_bins": None}, MLPDynamicsLoss),
    "flow": (FlowWorldModel, {}, FlowMatchingDynamicsLoss),
    "tasks": (MLPWorldModel, {"tasks": ["a", "b"], "task_dim": 4}, MLPDynamicsLoss),
}


def sequences(device: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = torch.randn(H + 1, B, 5, generator=g), 2 * torch.rand(H, B, 3, generator=g) - 1, torch.randn(H, B, 1, generator=g)
    return tuple(x.to(device) for x in found)


def agent(kind: str, device: str) -> PWM:
    torch.manual_seed(0)
    model, changes, loss = MODELS[kind]
    return PWM(stirred(small(model, **changes)).to(device), loss())


def on_both(run):
    """The results of ``run(device)`` on the host, on the fake device, and the waits of its last call there."""
    expected = run("cpu")
    with FakeCuda() as gpu:
        run("cuda")
        with gpu.counting() as waits:
            found = run("cuda")
    return expected, on_host(found), waits


@pytest.mark.parametrize("kind", MODELS)
def test_updates_of_a_world_model_are_those_of_the_host(kind):
    def run(device):
        found = agent(kind, device)
        task = torch.arange(B, device=device) % 2 if kind == "tasks" else None
        steps = [found.update_wm(*sequences(device), task) for _ in range(3)]
        return steps, [p.detach() for p in found.model.parameters()]

    expected, found, _ = on_both(run)
    assert found[0] == expected[0] and all(torch.equal(p, q) for p, q in zip(found[1], expected[1]))


@pytest.mark.parametrize("kind", ["mlp", "flow"])
def test_updates_of_a_policy_are_those_of_the_host(kind):
    config = AgentConfig(horizon=3, actor={"units": [16]}, critic={"units": [16], "members": 2}, critic_passes=1, critic_minibatches=2)

    def run(device):
        found = agent(kind, device)
        policy = found.add_policy(config, seed=1)
        obs = sequences(device)[0]
        steps = [found.update_policy(obs[i], i) for i in range(2)]
        return steps, policy.measure_esnr(found.model.encode(obs[0]).detach(), 0, 3), policy.act(found.model.encode(obs[0]))

    expected, found, _ = on_both(run)
    # On the host a flow rolls out by one C++ call, whose products round in another order.
    assert found[0] == [pytest.approx(told, rel=1e-4) for told in expected[0]] and found[1] == pytest.approx(expected[1], rel=1e-4)
    torch.testing.assert_close(found[2], expected[2])


def together(device: str, kind: str = "flow") -> Together:
    """Two agents that differ in their random seeds."""
    config = AgentConfig(horizon=3, actor={"units": [16]}, critic={"units": [16], "members": 2}, critic_passes=2, critic_minibatches=2)
    agents = []
    for seed in range(2):
        torch.manual_seed(seed)
        agents.append(PWM(stirred(small(MODELS[kind][0], encoder={"last_layer": "linear"}, standardise=True)).to(device)))
        agents[-1].add_policy(config, seed=seed)
    return Together(agents, [RandomStream() for _ in agents])


@pytest.mark.parametrize("kind", ["residual", "flow"])
def test_agents_that_train_together_are_those_of_the_host(kind):
    def run(device):
        both = together(device, kind)
        obs, act, rew = (torch.stack([x, x.roll(1, 1)], 1) for x in sequences(device))
        steps = [told for i in range(2) for told in (both.update_wm(obs, act, rew), both.update_policy(obs[i], i))]
        return steps, [p.detach() for found in both.agents for p in (*found.model.parameters(), *found.policy.actor.parameters())]

    expected, found, _ = on_both(run)
    for mine, theirs in zip(found[0], expected[0]):
        assert mine == [pytest.approx(told, rel=1e-4, abs=1e-6) for told in theirs]
    for p, q in zip(found[1], expected[1]):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_plans_are_those_of_the_host(method):
    def run(device):
        model = agent("mlp", device).model
        reach = {"chunk_size": 64} if method == "cem" else {}
        planner = Planner(
            model, horizon=3, samples=32, method=method, policy=lambda z: z[..., :3].tanh(), value=lambda z: z.sum(-1), **reach
        )
        planner.reset(B)
        z = model.encode(sequences(device)[0][0]).detach()
        planner.act(z)
        planner.forget(torch.arange(B) == 1)
        return planner.act(z), planner.last.value, planner.fallbacks

    expected, found, _ = on_both(run)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] == expected[2]


@pytest.mark.parametrize("method", ["loop", "ghost"])
@pytest.mark.parametrize("width", [3, 40])
def test_esnr_is_that_of_the_host(method, width):
    """With layers for which ghost norms form gradients, and for which they form Gram matrices; hooks run within the backward pass."""

    def run(device):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(6, width), nn.Mish(), nn.LayerNorm(width), nn.Linear(width, 3))
        model = nn.ModuleDict({"task": nn.Embedding(4, 6), "body": body}).to(device)
        meter = ESNRMeter(model, 4, method=method)
        x, y, task = torch.randn(12, 6).to(device), torch.randn(12, 3).to(device), torch.arange(12).to(device) % 4

        def loss(a, b, t):
            return (model["body"](a + model["task"](t)) - b).square().mean()

        found = meter.measure(loss, x, y, task)
        return found.esnr, found.losses, [p.grad for p in model.parameters()]

    expected, found, _ = on_both(run)
    assert found[0] == pytest.approx(expected[0], rel=0 if method == "loop" else 1e-6)  # ghost norms take another way on the host
    assert torch.equal(found[1], expected[1]) and all(torch.equal(g, h) for g, h in zip(found[2], expected[2]))


def test_a_measured_update_in_bfloat16_is_that_of_the_host():
    def run(device):
        found = agent("flow", device)
        meter = ESNRMeter(found.model, 3)
        with torch.autocast(device, dtype=torch.bfloat16):
            return [found.update_wm(*sequences(device), meter=meter) for _ in range(2)]

    expected, found, _ = on_both(run)
    assert found == expected
