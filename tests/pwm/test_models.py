"""World models: sizes, what each architecture is, and what must hold of latents, tasks and gradients."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.pwm.small_models import batch, plain_velocity, small, stirred
from ttcfast.integrators import Euler, Heun
from ttcfast.pwm.evaluation.parity import ParityError, parameter_parity
from ttcfast.pwm.models import SIZES, BaseWorldModel, FlowWorldModel, MLPWorldModel, ResidualWorldModel
from ttcfast.pwm.models.two_hot import TwoHot, symexp, symlog

ALL = (MLPWorldModel, ResidualWorldModel, FlowWorldModel)
TASKS = ("walker-walk", "cheetah-run", "reacher-easy")
MT30 = {"observation_dim": 24, "action_dim": 6, "multitask": True, "tasks": tuple(f"task-{i}" for i in range(30))}


# Counted from the public code's layer sizes: (encoder, MLP dynamics, flow dynamics, reward, whole MLP model with the embedding).
GOLDEN = {
    "5M": (155_904, 826_880, 826_368, 615_013, 1_599_717),
    "19M": (1_670_656, 2_176_512, 2_176_512, 1_754_213, 5_603_301),
    "48M": (7_974_912, 6_102_272, 6_102_528, 4_904_805, 18_983_909),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_parameter_counts(size):
    with torch.device("meta"):
        mlp, flow = (kind.of_size(size, **MT30) for kind in (MLPWorldModel, FlowWorldModel))
    encoder, dynamics, flow_dynamics, reward, whole = GOLDEN[size]
    counts = [sum(p.numel() for p in part.parameters()) for part in (mlp.encoder_network, mlp.dynamics_network, mlp.reward_network)]
    assert counts == [encoder, dynamics, reward]
    assert (mlp.dynamics_params, flow.dynamics_params, mlp.total_params) == (dynamics, flow_dynamics, whole)
    assert flow.total_params - mlp.total_params == flow_dynamics - dynamics


def test_the_largest_size_and_mt80():
    with torch.device("meta"):
        largest = MLPWorldModel.of_size("317M", **MT30)
        mt80 = MLPWorldModel.of_size("48M", 39, 6, multitask=True, tasks=tuple(map(str, range(80))), task_dim=96)
    assert largest.total_params == 108_280_805
    assert mt80.total_params == 19_188_581


def test_scalar_reward_of_the_single_task_configuration():
    with torch.device("meta"):
        ant = MLPWorldModel(37, 8, latent_dim=512, units=(512, 512), encoder_units=(256,), num_bins=None)
    assert (ant.dynamics_params, ant.total_params) == (795_136, 1_469_953)


@pytest.mark.parametrize("size", SIZES)
def test_parity_of_every_size_within_a_thousandth(size, caplog):
    caplog.set_level(logging.INFO, logger="ttcfast")
    with torch.device("meta"):
        flow = FlowWorldModel.of_size(size, **MT30)
    found = parameter_parity(flow, on_violation="abort")
    assert abs(found.gap) < 1e-3
    assert f"{found.model:,} parameters" in caplog.text and "dynamics" in caplog.text


def test_a_parity_violation_warns_or_aborts(caplog):
    wide, base = small(FlowWorldModel, units=(40, 40)), small(MLPWorldModel)
    found = parameter_parity(wide, base)
    assert found.gap > 0.02 and "more than the tolerance of 2.0%" in caplog.text
    with pytest.raises(ParityError, match="change units, or set"):
        parameter_parity(wide, base, on_violation="abort")
    assert parameter_parity(wide, base, tolerance=2.0, on_violation="abort") == found


@pytest.mark.parametrize("kind", ALL)
def test_shapes_and_initial_reward(kind):
    model = small(kind)
    z = model.encode(torch.randn(4, 7, 5))
    a = torch.rand(4, 7, 3)
    following, reward = model.step(z, a)
    assert z.shape == following.shape == (4, 7, 16) and reward.shape == (4, 7, 1)
    assert model.reward(z, a).shape == (4, 7, 101)
    assert reward.abs().max() < 1e-5  # the head begins at 0: a uniform distribution, whose mean is 0


def test_encoder_and_mlp_dynamics_end_on_simplices():
    model = stirred(small(MLPWorldModel))
    z = model.encode(torch.randn(9, 5))
    for latent in (z, model.next(z, torch.rand(9, 3))):
        assert bool((latent >= 0).all())
        torch.testing.assert_close(latent.unflatten(-1, (2, 8)).sum(-1), torch.ones(9, 2))


def test_the_networks_are_linear_layernorm_mish():
    """The dynamics of the baseline, written out by torch's own functions."""
    model = stirred(small(MLPWorldModel).double())
    z, a = batch(6, dtype=torch.float64)
    x = torch.cat([z, a], -1)
    network = model.dynamics_network
    for layer in network.hidden:
        x = F.mish(F.layer_norm(layer.linear(x), layer.norm.normalized_shape, layer.norm.weight, layer.norm.bias))
    linear, norm, _ = network.last
    expected = norm(linear(x)).unflatten(-1, (2, 8)).softmax(-1).flatten(-2)
    torch.testing.assert_close(model.next(z, a), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_velocity_is_an_mlp_on_latent_action_and_time(tau):
    model = stirred(small(FlowWorldModel).double())
    z, a = batch(6, dtype=torch.float64)
    expected = plain_velocity(model, z, a, tau)
    for time in (tau, torch.tensor(tau), torch.full((6,), tau), torch.full((6, 1), tau)):
        torch.testing.assert_close(model.velocity(z, a, time), expected, rtol=1e-12, atol=1e-13)
    assert expected.unflatten(-1, (2, 8)).sum(-1).abs().max() < 1e-13


@pytest.mark.parametrize("integrator", [Heun(1), Heun(3), Euler(2)], ids=repr)
@pytest.mark.parametrize("frozen", [False, True])
def test_fused_and_plain_paths_agree_with_all_gradients(integrator, frozen):
    model = stirred(small(FlowWorldModel, integrator=integrator).double())
    results, drawn = [], batch(2, 4, dtype=torch.float64)
    for fused in (True, False):
        model.fused = fused
        model.zero_grad()
        z, a = (t.clone().requires_grad_() for t in drawn)
        if frozen:
            with model.frozen():
                out = model.next(z, a)
        else:
            out = model.next(z, a)
        (out * torch.linspace(-1, 1, 16)).sum().backward()
        results.append([out.detach(), z.grad, a.grad, *(p.grad for p in model.dynamics_network.parameters())])
    for fused_one, plain_one in zip(*results):
        assert (fused_one is None) == (plain_one is None)
        if fused_one is not None:
            torch.testing.assert_close(fused_one, plain_one, rtol=1e-10, atol=1e-12)
    assert all((g is None) == frozen for g in results[0][3:])


def called(run) -> dict[str, int]:
    with torch.profiler.profile() as profile:
        run()
    return {event.key: event.count for event in profile.key_averages()}


def test_next_takes_the_fused_path_by_default():
    model = small(FlowWorldModel, integrator=Heun(4))
    z, a = batch(3)
    counts = called(lambda: model.next(z, a))
    assert not [name for name in counts if name in ("aten::mish", "aten::layer_norm", "ttcfast::norm_mish", "ttcfast::heun_predict")]
    assert counts["aten::addmm" if "aten::addmm" in counts else "aten::mm"] == 1  # the conditions; one call makes all other products
    fused = model.next(z, a)
    model.fused = False
    torch.testing.assert_close(model.next(z, a), fused)


def test_frozen_dynamics_leave_no_weight_gradient_and_come_back():
    for kind in ALL:
        model = small(kind)
        before = [p.requires_grad for p in model.parameters()]
        z, a = batch(3)
        a.requires_grad_()
        with model.frozen():
            following, reward = model.step(z, a)
            reward = reward + model.step(following, a)[1] + following.square().sum(-1, keepdim=True)
        reward.sum().backward()
        assert a.grad is not None and bool((a.grad != 0).any())
        assert all(p.grad is None for p in model.parameters())
        assert [p.requires_grad for p in model.parameters()] == before


def test_group_sums_are_kept_over_a_long_rollout():
    for integrator in (Heun(4), Euler(4)):
        for dtype in ("float32", "bfloat16"):
            model = stirred(small(FlowWorldModel, integrator=integrator, matmul_dtype=dtype))
            z, a = batch(16)
            for _ in range(16):
                z = model.next(z, a)
            assert (z.unflatten(-1, (2, 8)).sum(-1) - 1).abs().max() < 1e-6 * max(1.0, float(z.abs().max().detach()))


def test_residual_model_is_one_euler_step_without_time():
    residual, flow = stirred(small(ResidualWorldModel)), small(FlowWorldModel, integrator=Euler(1))
    with torch.no_grad():
        for target, source in zip(flow.dynamics_network.parameters(), residual.dynamics_network.parameters()):
            target.zero_()
            target[(..., *(slice(0, n) for n in source.shape))] = source
    z, a = batch(6)
    torch.testing.assert_close(flow.next(z, a), residual.next(z, a))


def test_bfloat16_products_stay_near_the_float32_ones():
    model = stirred(small(FlowWorldModel, integrator=Heun(2)))
    z, a = batch(64)
    exact = model.next(z, a)
    model.matmul_dtype = "bfloat16"
    rough = model.next(z, a)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).norm() / (exact - z).norm() < 0.02


@pytest.mark.parametrize("kind", ALL)
def test_tasks_condition_everything_and_mask_actions(kind):
    model = stirred(small(kind, multitask=True, tasks=TASKS, task_dim=4, action_dims=(3, 2, 1)))
    obs, ids = torch.randn(3, 5), torch.tensor([0, 1, 2])
    z = model.encode(obs, ids)
    for i, name in enumerate(TASKS):
        torch.testing.assert_close(z[i], model.encode(obs, name)[i])
        torch.testing.assert_close(z[i], model.encode(obs, i)[i])
    assert (model.encode(obs, 0) - model.encode(obs, 1)).abs().max() > 1e-3
    a = torch.rand(3, 3, requires_grad=True)
    following, reward = model.step(z, a, ids)
    (following.square().sum() + reward.sum()).backward()
    assert (a.grad != 0).tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    horizon = model.next(z.expand(4, 3, 16), a.expand(4, 3, 3), ids)
    torch.testing.assert_close(horizon, following.expand(4, 3, 16))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("fill", [9.0, torch.nan, torch.inf])
def test_nothing_of_a_masked_action_entry_is_seen(kind, fill):
    model = stirred(small(kind, multitask=True, tasks=TASKS, task_dim=4, action_dims=(3, 2, 1)))
    (z, a), ids = batch(6), torch.ones(6, dtype=torch.int64)
    results = []
    for padding in (0.0, fill):
        given = a.clone()
        given[:, 2] = padding
        given.requires_grad_()
        following, reward = model.step(z, given, ids)
        grads = torch.autograd.grad(following.square().sum() + reward.sum(), [given, *model.parameters()], allow_unused=True)
        results.append([following, reward, *(g for g in grads if g is not None)])
    assert results[1][2][:, 2].eq(0).all()
    assert all(torch.equal(found, expected) for found, expected in zip(*results))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("lead", [(), (0,), (0, 3), (2, 0)], ids=str)
def test_any_leading_axes_even_empty_ones(kind, lead):
    for options in ({}, {"multitask": True, "tasks": TASKS, "task_dim": 4, "action_dims": (3, 2, 1)}):
        model, task = small(kind, **options), 1 if options else None
        z, a = torch.zeros(*lead, 16, requires_grad=True), torch.zeros(*lead, 3)
        following, reward = model.step(z, a, task)
        assert (following.shape, reward.shape) == ((*lead, 16), (*lead, 1))
        assert model.reward(z, a, task).shape == (*lead, 101)
        assert model.encode(torch.zeros(*lead, 5), task).shape == (*lead, 16)
        following.sum().backward()
        assert z.grad.shape == z.shape


def test_task_embeddings_are_no_longer_than_one():
    model = small(MLPWorldModel, multitask=True, tasks=TASKS, task_dim=4)
    weight = model.task_embedding.weight
    assert float(weight.abs().max().detach()) <= 0.02
    with torch.no_grad():
        weight.mul_(1000)
    before = weight.detach().clone()
    assert model.embedding_of(torch.arange(3), torch.ones(3, 1)).norm(dim=-1).max() <= 1 + 1e-6
    assert torch.equal(weight, before), "reading an embedding writes nothing"


def test_two_hot_spreads_a_value_over_its_two_neighbours():
    two_hot = TwoHot()
    values = torch.tensor([0.0, 1.0, -3.7, 250.0, 1e9, -1e9]).unsqueeze(-1)
    probabilities = two_hot.encode(values)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(6))
    assert int((probabilities > 1e-6).sum(-1).max()) <= 2
    inside = values.abs() < 2e4
    torch.testing.assert_close(two_hot.decode(probabilities.log().clamp_min(-1e4))[inside], values[inside], rtol=1e-4, atol=1e-4)
    assert (probabilities[4, -1], probabilities[5, 0]) == (1, 1)


def test_two_hot_computes_16_bit_numbers_in_float32():
    two_hot, values = TwoHot(), torch.tensor([[0.0], [0.5], [-3.7], [300.0], [-2e4]])
    for dtype in (torch.bfloat16, torch.float16):
        given = values.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = two_hot.encode(given)
        assert torch.equal(found, two_hot.encode(given.float()))
        torch.testing.assert_close(found.sum(-1), torch.ones(5))
        logits = torch.randn(4, 101).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(two_hot.decode(logits), two_hot.decode(logits.float()))
            assert torch.equal(two_hot.cross_entropy(logits, given[:4]), two_hot.cross_entropy(logits.float(), given[:4].float()))
        peak = two_hot.encode(given.float()).log().clamp_min(-1e4).to(dtype)  # log-probabilities of that dtype say 300 to 2 %
        torch.testing.assert_close(two_hot.decode(peak), given.float(), rtol=0.02, atol=1e-3)
    assert two_hot.encode(values.double()).dtype == two_hot.decode(torch.zeros(1, 101).double()).dtype == torch.float64


@pytest.mark.parametrize("f", [symlog, symexp])
def test_symlog_and_symexp_have_slope_one_at_zero(f):
    x = torch.tensor([0.0, -0.0, 1e-30, 2.0, -2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    away = 1 / 3 if f is symlog else math.exp(2)
    torch.testing.assert_close(slope, torch.tensor([1.0, 1.0, 1.0, away, away], dtype=torch.float64))
    bend = -1 / 9 if f is symlog else math.exp(2)
    torch.testing.assert_close(curvature[3:], torch.tensor([bend, -bend], dtype=torch.float64))
    assert curvature[:3].abs().tolist() == [1, 1, 1]
    plain = x.sign() * (x.abs().log1p() if f is symlog else x.abs().expm1())
    assert torch.equal(f(x), plain)
    assert f(torch.tensor([torch.nan])).isnan().all()


def test_symlog_of_large_numbers_keeps_its_gradient():
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf], requires_grad=True)
    symlog(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([1e-30, 1e-30, 0.0, 0.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bins", [2, 3, 101])
def test_equal_logits_are_not_where_learning_ends(bins):
    """A reward head begins at 0: d decode / d logit_i = p_i (bin_i - mean) there."""
    two_hot, logits = TwoHot(bins), torch.zeros(1, bins, requires_grad=True)
    (grad,) = torch.autograd.grad(two_hot.decode(logits).sum(), logits)
    torch.testing.assert_close(grad[0], two_hot.bins(logits) / bins, rtol=1e-4, atol=1e-6)


def test_symexp_inverts_symlog():
    x = torch.tensor([-2e4, -1.0, 0.0, 1e-3, 7.0], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x)


def test_cross_entropy_of_two_hot_is_least_at_the_truth():
    two_hot, value = TwoHot(), torch.tensor([[1.3]], dtype=torch.float64)
    two_hot.double()
    logits = torch.zeros(1, 101, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(two_hot.cross_entropy(logits, value).sum(), logits)
    torch.testing.assert_close(grad, logits.softmax(-1) - two_hot.encode(value))


@pytest.mark.parametrize("kind", ALL)
def test_finite_differences_of_the_actors_gradient(kind):
    """A two-step return, differentiated through the frozen model with respect to the actions."""
    model = stirred(small(kind).double())
    z, _ = batch(2, dtype=torch.float64)

    def value(actions: Tensor) -> Tensor:
        state, total = z, z.new_zeros(2, 1)
        with model.frozen():
            for a in actions:
                state, reward = model.step(state, a)
                total = total + reward.tanh() + state[..., :1]
        return total

    assert torch.autograd.gradcheck(value, (torch.rand(2, 2, 3, dtype=torch.float64).requires_grad_(),))


OBS, Z, A = torch.ones(2, 5), torch.ones(2, 16) / 8, torch.ones(2, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("latent_dim is 20, which SimNorm's group of 8 does not divide", lambda: small(MLPWorldModel, latent_dim=20)),
        ("latent_dim is 16, which SimNorm's group of 5", lambda: small(FlowWorldModel, encoder=simnorm(5))),
        (r"obs has shape \(2, 4\); this model takes 5 entries", lambda: small(MLPWorldModel).encode(OBS[:, :4])),
        (r"a has shape \(2, 2\); this model takes 3 entries", lambda: small(FlowWorldModel).next(Z, A[:, :2])),
        (r"z has shape \(2, 15\)", lambda: small(ResidualWorldModel).next(Z[:, :15], A)),
        (r"z has shape \(2, 16\) and a \(1, 3\)", lambda: small(FlowWorldModel).next(Z, A[:1])),
        ("tau is 1.5; times lie in", lambda: small(FlowWorldModel).velocity(Z, A, 1.5)),
        ("tau holds -0.5; times lie in", lambda: small(FlowWorldModel).velocity(Z, A, torch.tensor([0.5, -0.5]))),
        ("tau holds nan", lambda: small(FlowWorldModel).velocity(Z, A, torch.tensor(float("nan")))),
        ("task is 'walker-fly'; the model knows walker-walk, cheetah-run, reacher-easy", lambda: tasked().encode(OBS, "walker-fly")),
        ("task is 3; the model knows 0: walker-walk, 1: cheetah-run", lambda: tasked().encode(OBS, 3)),
        ("task is torch.float32", lambda: tasked().encode(OBS, torch.ones(2))),
        ("task is None; this model is made for the tasks walker-walk", lambda: tasked().encode(OBS)),
        ("task is 1; this model is made for a single task", lambda: small(MLPWorldModel).encode(OBS, 1)),
        ("tasks is empty", lambda: small(MLPWorldModel, multitask=True)),
        (r"action_dims is \(3, 4, 1\); give one number from 1 to action_dim = 3", lambda: tasked(action_dims=(3, 4, 1))),
        ("dynamics.last_layer is 'simnorm'; a velocity takes both signs", lambda: small(FlowWorldModel, dynamics=simnorm(8))),
        ("last_layer is 'softmax'; it must be one of", lambda: small(MLPWorldModel, encoder={"last_layer": "softmax"})),
        ("last_layer_kwargs has 'gruop'", lambda: small(MLPWorldModel, dynamics={**simnorm(8), "last_layer_kwargs": {"gruop": 8}})),
        ("units is empty", lambda: small(MLPWorldModel, units=())),
        ("latent_dim is 0", lambda: small(MLPWorldModel, latent_dim=0)),
        ("size is '7M'; it must be one of 'cpu', '5M'", lambda: MLPWorldModel.of_size("7M", 5, 3)),
        ("vmin is 1 and vmax -1", lambda: small(MLPWorldModel, vmin=1, vmax=-1)),
        ("matmul_dtype is 'float16'", lambda: small(FlowWorldModel, matmul_dtype="float16")),
        ("on_violation is 'ignore'", lambda: parameter_parity(small(FlowWorldModel), on_violation="ignore")),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def simnorm(group: int) -> dict:
    return {"last_layer": "simnorm", "last_layer_kwargs": {"group": group}}


def tasked(**changes) -> BaseWorldModel:
    return small(MLPWorldModel, **{"multitask": True, "tasks": TASKS, "task_dim": 4, **changes})
