"""compute_wm_loss: against a plain implementation in float64, where its gradient goes, and updates that are skipped."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.pwm.small_models import batch, plain_velocity, small, stirred
from ttcfast.integrators import Euler, Heun
from ttcfast.pwm.algorithms import PWM, FlowMatchingDynamicsLoss, MLPDynamicsLoss
from ttcfast.pwm.models import BaseWorldModel, FlowWorldModel, MLPWorldModel, ResidualWorldModel
from ttcfast.pwm.models.layers import simplex_distance
from ttcfast.pwm.utils.metrics import ESNRMeter, esnr

H, B = 4, 6
GAMMA = 0.9


def sequences(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(H + 1, B, 5, dtype=dtype), 2 * torch.rand(H, B, 3, dtype=dtype) - 1, torch.randn(H, B, 1, dtype=dtype)


def plain_network(network, x: Tensor) -> Tensor:
    for layer in network.hidden:
        x = F.mish(F.layer_norm(layer.linear(x), layer.norm.normalized_shape, layer.norm.weight, layer.norm.bias))
    return network.last(x)


def centred(x: Tensor) -> Tensor:
    x = x.unflatten(-1, (-1, 8))
    return (x - x.mean(-1, keepdim=True)).flatten(-2)


def plain_next(model: BaseWorldModel, z: Tensor, a: Tensor) -> Tensor:
    """One step by torch's own functions, concatenated inputs and autograd."""
    if isinstance(model, MLPWorldModel):
        return plain_network(model.dynamics_network, torch.cat([z, a], -1))
    if isinstance(model, ResidualWorldModel):
        return z + centred(plain_network(model.dynamics_network, torch.cat([z, a], -1)))
    count = model.integrator.substeps
    for k in range(count):
        k1 = plain_velocity(model, z, a, k / count)
        if isinstance(model.integrator, Euler):
            z = z + k1 / count
        else:
            z = z + (k1 + plain_velocity(model, z + k1 / count, a, (k + 1) / count)) / (2 * count)
    return z


def plain_loss(model: BaseWorldModel, obs: Tensor, act: Tensor, rew: Tensor, tau: Tensor | None) -> Tensor:
    """Flow plan, "Mathematical Specification", step by step, with means over entries and the two-hot cross-entropy written out."""
    z, total = plain_network(model.encoder_network, obs[0]), 0
    bins = torch.linspace(-10, 10, 101, dtype=obs.dtype)
    for t in range(H):
        target = plain_network(model.encoder_network, obs[t + 1]).detach()
        if tau is not None:
            mixed = (1 - tau[t]) * z + tau[t] * target
            x = torch.cat([mixed, act[t], tau[t]], -1)
            error = centred(plain_network(model.dynamics_network, x)) - (target - z)
        logits = plain_network(model.reward_network, torch.cat([z, act[t]], -1))
        x = rew[t].sign() * rew[t].abs().log1p()
        low = ((x + 10) / 0.2).floor()
        share = (x + 10) / 0.2 - low
        truth = torch.zeros_like(logits).scatter(-1, low.long(), 1 - share).scatter(-1, low.long() + 1, share)
        assert torch.allclose((truth * bins).sum(-1, keepdim=True), x)
        following = plain_next(model, z, act[t])
        if tau is None:
            error = following - target
        reward = -(truth * logits.log_softmax(-1)).sum(-1).mean()
        total = total + GAMMA**t * (3 * error.square().mean() + 0.5 * reward) / H
        z = following
    return total


MODES = {
    "mlp": (MLPWorldModel, {}, None),
    "residual": (ResidualWorldModel, {}, None),
    "flow, heun 1": (FlowWorldModel, {"integrator": Heun(1)}, "uniform"),
    "flow, heun 3": (FlowWorldModel, {"integrator": Heun(3)}, "uniform"),
    "flow, euler 2": (FlowWorldModel, {"integrator": Euler(2)}, "uniform"),
    "flow, plain path": (FlowWorldModel, {"fused": False}, "uniform"),
    "flow, midpoint": (FlowWorldModel, {}, "midpoint"),
}


@pytest.mark.filterwarnings("ignore:tau_sampling='midpoint'")
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient_are_those_of_the_plain_implementation(mode):
    kind, changes, sampling = MODES[mode]
    model = stirred(small(kind, **changes).double())
    loss = FlowMatchingDynamicsLoss(sampling) if sampling else MLPDynamicsLoss()
    agent, (obs, act, rew) = PWM(model, loss, gamma=GAMMA, dynamics_weight=3, reward_weight=0.5), sequences()
    act.requires_grad_()
    inputs = [act, *model.parameters()]

    torch.manual_seed(3)
    found = agent.compute_wm_loss(obs, act, rew)
    gradient = torch.autograd.grad(found.total, inputs)
    torch.manual_seed(3)
    tau = None
    if sampling:
        tau = loss.times(torch.empty(H, B, 16, dtype=torch.float64))
    expected = plain_loss(model, obs, act, rew, tau)
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-13)
    for f, e in zip(gradient, torch.autograd.grad(expected, inputs)):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [MLPWorldModel, ResidualWorldModel, FlowWorldModel])
def test_gradient_flows_through_the_rollout_and_stops_at_the_target(kind):
    model = stirred(small(kind).double())
    agent, (obs, act, rew) = PWM(model), sequences()
    obs.requires_grad_()
    (grad,) = torch.autograd.grad(agent.compute_wm_loss(obs, act, rew).dynamics, obs)
    assert bool((grad[0] != 0).any()) and bool((grad[1:] == 0).all())


class _WithLast(FlowMatchingDynamicsLoss):
    """Has the rollout make the last state too, which nothing reads."""

    reads_last = True


@pytest.mark.parametrize("meter", [False, True])
@pytest.mark.parametrize("changes", [{}, {"fused": False}, {"encoder": {"last_layer": "linear"}}], ids=str)
def test_a_rollout_without_the_unread_last_state_trains_the_same_bits(changes, meter):
    model = stirred(small(FlowWorldModel, **changes))
    obs, act, rew = sequences(torch.float32)
    agents = [PWM(copy.deepcopy(model), loss) for loss in (FlowMatchingDynamicsLoss(), _WithLast())]
    told = []
    for agent in agents:
        torch.manual_seed(4)
        told.append(agent.update_wm(obs, act, rew, meter=ESNRMeter(agent.model, 3) if meter else None))
    names = ("loss", "dynamics", "reward", "gradient_norm", "updated", *(["esnr"] if meter else []))
    assert [told[0][name] for name in names] == [told[1][name] for name in names] and told[0]["updated"] == 1
    assert all(torch.equal(a, b) for a, b in zip(agents[0].model.parameters(), agents[1].model.parameters()))
    assert [len(agent.compute_wm_loss(obs, act, rew).latents) for agent in agents] == [H, H + 1]
    assert [agent.wm_evaluations(H) for agent in agents] == [4 * (H - 1) + H, 4 * H + H]


@pytest.mark.parametrize("kind", [MLPWorldModel, FlowWorldModel])
def test_a_single_step_is_trained(kind):
    obs, act, rew = sequences(torch.float32)
    agent = PWM(small(kind))
    found = agent.update_wm(obs[:2], act[:1], rew[:1])
    assert found["updated"] == 1 and found["dynamics"] > 0 and 0 < found["largest_latent"] <= 1
    assert found["simplex_distance"] == pytest.approx(0, abs=1e-6)


def test_latents_are_told_in_the_unit_of_the_largest_target():
    """Observations as they come may have any size, which is no sign of a rollout that ran away."""
    model = small(MLPWorldModel, encoder={"last_layer": "linear"})
    obs, act, rew = sequences(torch.float32)
    with torch.no_grad():
        model.encoder_network.last.weight.mul_(1e5)
    found = PWM(model).compute_wm_loss(obs, act, rew)
    largest = model.encode(obs[1:]).abs().max()
    assert largest > 100
    torch.testing.assert_close(found.largest_latent, found.latents.detach().abs().max() / largest)


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_of_a_flow_waits_for_no_value(fused):
    """Tensors without values would raise where the host asks for one, which on a GPU is a wait."""
    agent = PWM(small(FlowWorldModel, fused=fused).to("meta"))
    data = (t.to("meta") for t in sequences(torch.float32))
    assert agent.compute_wm_loss(*data).total.device.type == "meta"


def test_flow_loss_is_least_where_the_velocity_is_the_straight_path():
    """A model whose velocity is 0 has the loss |z_e - z_s|^2, and none where nothing changes."""
    model = small(FlowWorldModel).double()
    with torch.no_grad():
        model.dynamics_network.last.weight.zero_()
    z, _ = batch(H + 1, B, dtype=torch.float64)
    act, loss = torch.rand(H, B, 3, dtype=torch.float64), FlowMatchingDynamicsLoss()
    torch.testing.assert_close(loss(model, z, act, z[1:]), (z[1:] - z[:-1]).square().mean((1, 2)))
    assert bool((loss(model, z, act, z[:-1]) == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_bins": None}, {"encoder": {"last_layer": "linear"}}], ids=str)
@pytest.mark.parametrize("kind", [MLPWorldModel, ResidualWorldModel, FlowWorldModel])
def test_autocast_rounds_matrix_products_alone(kind, options, dtype):
    agent = PWM(stirred(small(kind, **options)))
    obs, act, rew = torch.randn(5, 8, 5), 2 * torch.rand(4, 8, 3) - 1, 3 * torch.randn(4, 8, 1)
    found = []
    for mixed in (False, True):
        agent.model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=mixed):
            loss = agent.compute_wm_loss(obs, act, rew)
        loss.total.backward()
        grad = torch.cat([p.grad.flatten() for p in agent.model.parameters()])
        found.append((loss, grad))
        assert {value.dtype for value in loss} == {torch.float32}
    (exact, exact_grad), (rough, grad) = found
    torch.testing.assert_close(rough.total, exact.total, rtol=0.01, atol=0)
    assert 0 < (grad - exact_grad).norm() < 0.05 * exact_grad.norm()
    if agent.model.group:  # the groups' sums survive: probabilities and velocities are not rounded after their sums are fixed
        torch.testing.assert_close(rough.latents.unflatten(-1, (-1, 8)).sum(-1), torch.ones(len(rough.latents), 8, 2))


def test_times_are_uniform_or_the_midpoint():
    like = torch.empty(40, 500, 16)
    tau = FlowMatchingDynamicsLoss().times(like)
    assert tau.shape == (40, 500, 1) and float(tau.min()) >= 0 and float(tau.max()) < 1
    counts = torch.histc(tau, bins=10, min=0, max=1)
    assert float((counts - 2000).abs().max()) < 5 * math.sqrt(2000)
    with pytest.warns(UserWarning, match="never|untrained"):
        midpoint = FlowMatchingDynamicsLoss("midpoint")
    assert bool((midpoint.times(like) == 0.5).all())


@pytest.mark.parametrize("kind", [MLPWorldModel, ResidualWorldModel, FlowWorldModel])
def test_training_lowers_the_loss_of_a_simple_world(kind):
    torch.manual_seed(1)
    agent = PWM(small(kind), lr=5e-3)
    matrix = torch.linalg.qr(torch.randn(5, 5)).Q

    def world() -> tuple[Tensor, Tensor, Tensor]:
        obs, act = [torch.randn(32, 5)], 2 * torch.rand(H, 32, 3) - 1
        for a in act:
            obs.append(obs[-1] @ matrix + 0.3 * F.pad(a, (0, 2)))
        return torch.stack(obs), act, torch.stack(obs)[1:].sum(-1, keepdim=True)

    first = [agent.update_wm(*world())["reward"] for _ in range(5)]
    for _ in range(50):
        last = agent.update_wm(*world())
    assert last["reward"] < 0.8 * min(first)
    assert agent.sanity.skipped == 0 and last["updated"] == 1


def test_simplex_distance():
    z, _ = batch(20)
    assert simplex_distance(z, 8) < 1e-6 and simplex_distance(z - 5, 0) == 0
    assert float(simplex_distance(z * 1.5, 8)) == pytest.approx(0.5, abs=1e-5)
    flipped = torch.zeros(1, 8)
    flipped[0, :2] = torch.tensor([2.0, -1.0])
    assert simplex_distance(flipped, 8) == 1


def test_measuring_in_chunks_draws_the_same_times():
    """What ESNR relies on: chunks of a batch, drawn in order after one seed, are a run of their own that repeats bit for bit."""
    agent, (obs, act, rew) = PWM(small(FlowWorldModel)), sequences(torch.float32)

    def run() -> list[Tensor]:
        torch.manual_seed(9)
        halves = [agent.compute_wm_loss(obs[:, i : i + 3], act[:, i : i + 3], rew[:, i : i + 3]).total for i in (0, 3)]
        return list(torch.autograd.grad(sum(halves), agent.model.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_a_measured_update_is_that_of_the_same_chunks():
    """Bit for bit: weights, Adam's moments and random states; and what it tells is of the whole batch."""
    obs, act, rew = sequences(torch.float32)
    task = torch.tensor([0, 1, 0, 1, 1, 0])
    model = small(FlowWorldModel, tasks=("walk", "run"), multitask=True)
    measured, plain, other = (PWM(copy.deepcopy(model)) for _ in range(3))
    torch.manual_seed(9)
    told = measured.update_wm(obs, act, rew, task, meter=ESNRMeter(measured.model, 3))
    torch.manual_seed(9)
    losses = []
    for rows in torch.arange(B).chunk(3):
        losses.append(plain.compute_wm_loss(obs[:, rows], act[:, rows], rew[:, rows], task[rows]))
        (losses[-1].total / 3).backward()
    norm = plain.wm_optimizer.collect([p.grad for p in plain.model.parameters()], plain.clip)
    plain.wm_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(measured.model.parameters(), plain.model.parameters()))
    a, b = (agent.wm_optimizer.state_dict()["state"] for agent in (measured, plain))
    assert all(torch.equal(a[i][name], b[i][name]) for i in a for name in a[i])
    assert told["loss"] == pytest.approx(sum(loss.total.item() for loss in losses) / 3, rel=1e-6) and told["gradient_norm"] == float(norm)
    assert told["largest_latent"] == max(loss.largest_latent.item() for loss in losses)
    grads = []
    torch.manual_seed(9)
    for rows in torch.arange(B).chunk(3):
        total = other.compute_wm_loss(obs[:, rows], act[:, rows], rew[:, rows], task[rows]).total
        grads.append(list(torch.autograd.grad(total, other.model.parameters())))
    assert told["esnr"] == pytest.approx(esnr(grads).raw, rel=1e-4)


OBS, ACT, REW = (t.float() for t in sequences())


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"obs has shape \(4, 6, 5\), act \(4, 6, 3\)", lambda: PWM(small(MLPWorldModel)).compute_wm_loss(OBS[1:], ACT, REW)),
        (r"rew \(4, 6\); expected", lambda: PWM(small(MLPWorldModel)).compute_wm_loss(OBS, ACT, REW[..., 0])),
        ("horizon .* is 0", lambda: PWM(small(MLPWorldModel)).compute_wm_loss(OBS[:1], ACT[:0], REW[:0])),
        ("needs a FlowWorldModel and was given a MLP", lambda: FlowMatchingDynamicsLoss()(small(MLPWorldModel), OBS, ACT, OBS[1:])),
        ("dynamics_loss is FlowMatching.* use MLPDynamicsLoss", lambda: PWM(small(MLPWorldModel), FlowMatchingDynamicsLoss())),
        ("tau_sampling is 'normal'", lambda: FlowMatchingDynamicsLoss("normal")),
        ("gamma is 1.2", lambda: PWM(small(MLPWorldModel), gamma=1.2)),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
