import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.surrogates import DropNet, Shift, drop_surrogate, euler_state, shift_surrogate
from ttcfast.core.base_fm import BaseFM, Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.spec import StateSpec, StochasticConfig
from ttcfast.stochastic_sampling import DeterministicModelError, enable_mc_dropout

SPEC = StateSpec.euler2d()
IDS = torch.arange(4)


def draw(fm: Surrogate, x: Tensor, ids: Tensor = IDS, **changes) -> Tensor:
    return fm.candidates(x, ids, **{"problem_ids": torch.arange(len(x)), "seed": 0, "step": 0, **changes})


def test_the_plans_contract():
    class Noisy(BaseFM):
        def forward(self, x_t: Tensor) -> Tensor:
            return x_t + torch.randn_like(x_t)

    fm, x = Noisy(), torch.zeros(4, 3, 3)
    assert torch.equal(fm.sample_next(x, seed=3), fm.sample_next(x, seed=3))
    assert not torch.equal(fm.sample_next(x), fm.sample_next(x))
    assert fm.sample_next(x.expand(5, 4, 3, 3), seed=1, multi=True).shape == (5, 4, 3, 3)
    with pytest.raises(NotImplementedError, match="BaseFM has no forward"):
        BaseFM()(x)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(3, 6), st.sampled_from([torch.float32, torch.float64]))
def test_candidates_are_one_forward_of_all_and_typed_like_the_state(n, b, size, dtype):
    fm = drop_surrogate()
    fm.model.calls.clear()
    out = draw(fm, euler_state(n, size, dtype=dtype), torch.arange(b))
    assert out.shape == (n, b, 4, size, size) and out.dtype == dtype
    assert fm.model.calls == [n * b]


def test_the_same_arguments_give_the_same_candidates_and_others_others():
    fm, x = drop_surrogate(), euler_state()
    first = draw(fm, x)
    torch.rand(5)  # the global streams do not matter
    assert torch.equal(draw(fm, x), first)
    for change in ({"seed": 1}, {"step": 1}, {"ids": IDS + 4}, {"problem_ids": torch.arange(3) + 3}):
        assert not torch.equal(draw(fm, x, **change), first), change


def test_problems_and_candidates_are_not_mixed_up():
    x = euler_state(3) * torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1, 1)
    out = draw(shift_surrogate(1e-3), x)
    assert (out - x.roll(1, -1).unsqueeze(1)).abs().max() < 0.01


def test_a_call_leaves_no_trace_on_the_model():
    model = DropNet(p=0.5)
    fm = Surrogate(model, SPEC, stochastic=StochasticConfig(dropout_p=0.2, dropout_after=("lift",), latent_sigma=0.1, input_eps=0.1))
    model.train()  # as a training loop leaves it between its own validations
    model.head.eval()
    before = copy.deepcopy(model.state_dict())
    flags = [(m.training, getattr(m, "p", None), len(m._forward_hooks)) for m in model.modules()]
    x, state = euler_state(), torch.random.get_rng_state()
    clean = fm.deterministic(x)
    draw(fm, x)
    fm.sample_next(x[0], seed=0)
    assert torch.equal(fm.deterministic(x), clean)
    assert [(m.training, getattr(m, "p", None), len(m._forward_hooks)) for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrapping_puts_the_model_in_evaluation():
    model = DropNet().train()
    Surrogate(model, SPEC)
    assert not any(m.training for m in model.modules())


def test_the_deterministic_step_is_so_even_where_dropout_was_enabled_for_good():
    fm, x = drop_surrogate(), euler_state()
    clean = fm.deterministic(x)
    enable_mc_dropout(fm.model, p=0.5, after=["lift"])
    assert torch.equal(fm.deterministic(x), clean)
    fm.stochastic = StochasticConfig(dropout=False, input_eps=1e-3)
    assert (draw(fm, x) - clean.unsqueeze(1)).abs().max() < 1e-2  # dropout=False silences it among candidates too


def test_delta_state_and_normalisation_are_undone():
    x = euler_state()
    norm = Normalizer(torch.tensor([1.0, 0.0, 0.5, 2.0]), torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(Surrogate(Shift(), SPEC, normalizer=norm).deterministic(x), x.roll(1, -1))
    delta = Surrogate(nn.Identity(), SPEC, normalizer=norm, predicts="delta").deterministic(x)
    torch.testing.assert_close(delta, x + norm.delta_std.reshape(4, 1, 1) * norm.encode(x))
    torch.testing.assert_close(Surrogate(nn.Identity(), SPEC, predicts="delta").deterministic(x), 2 * x)


def test_noise_is_in_the_units_of_the_normalised_input():
    norm = Normalizer(torch.zeros(4), torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    fm = Surrogate(nn.Identity(), SPEC, normalizer=norm, stochastic=StochasticConfig(dropout=False, input_eps=0.1))
    out = draw(fm, torch.zeros(2, 4, 32, 32))
    torch.testing.assert_close(out.transpose(1, 2).flatten(2).std(2)[0], 0.1 * norm.std, rtol=0.1, atol=0)


def test_latent_noise_goes_where_the_model_says():
    fm, x = drop_surrogate(stochastic={"dropout": False, "latent_sigma": 0.1}), euler_state()
    assert not torch.equal(draw(fm, x)[:, 0], draw(fm, x)[:, 1])
    nowhere = Surrogate(nn.Conv2d(4, 4, 1), SPEC, stochastic={"dropout": False, "latent_sigma": 0.1})
    with pytest.raises(ValueError, match=r"does not say where its latent is; name the module in StochasticConfig\(latent_at=...\)"):
        draw(nowhere, x)


def test_the_models_dtype_is_its_own():
    x = euler_state()
    fm = Surrogate(DropNet().to(torch.bfloat16), SPEC, predicts="delta")
    assert draw(fm, x).dtype == fm.deterministic(x).dtype == torch.float32


def test_history_is_stacked_oldest_first_and_delta_is_to_the_latest():
    fm = drop_surrogate(history=2)
    window = torch.stack([euler_state(seed=0), euler_state(seed=1)], 1)  # [N, 2, 4, 8, 8]
    expected = window[:, 1] + fm.model(torch.cat([window[:, 0], window[:, 1]], 1))
    torch.testing.assert_close(fm.deterministic(window), expected)
    assert draw(fm, window).shape == (3, 4, 4, 8, 8)
    assert fm.sample_next(window[0], seed=0).shape == (4, 8, 8)
    with pytest.raises(ValueError, match=r"x has shape \(3, 4, 8, 8\); expected \[N, 2, 4, S, S\]"):
        fm.deterministic(window[:, 0])


def test_one_and_three_dimensions():
    for ndim, spec in ((1, StateSpec.euler1d()), (3, StateSpec.euler3d())):
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[ndim]
        c = spec.num_channels
        fm = Surrogate(nn.Sequential(conv(c, c, 1), nn.Dropout(0.5)), spec)
        assert draw(fm, torch.rand(2, c, *[5] * ndim)).shape == (2, 4, c, *[5] * ndim)


def test_tuples_are_unpacked_as_told():
    class Three(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int, Tensor]:
            return x, 0, x.roll(1, -1)

    x = euler_state()
    assert torch.equal(Surrogate(Three(), SPEC, unpack=lambda out: out[2]).deterministic(x), x.roll(1, -1))
    with pytest.raises(ValueError, match=r"Three returned a tuple; take the next state out of it with Surrogate\(unpack=...\)"):
        Surrogate(Three(), SPEC).deterministic(x)
    with pytest.raises(ValueError, match=r"returned shape \(3, 5, 8, 8\).*expected \(3, 4, 8, 8\)"):
        Surrogate(nn.Conv2d(4, 5, 1), SPEC).deterministic(x)


def test_a_model_that_stays_deterministic_raises():
    x = euler_state()
    for fm in (Surrogate(nn.Conv2d(4, 4, 1), SPEC), drop_surrogate(p=0.0)):
        with pytest.raises(DeterministicModelError, match=r"stays deterministic.*dropout_p=.*dropout_after=.*input_eps="):
            draw(fm, x)
        assert draw(fm, x, IDS[:1]).shape == (3, 1, 4, 8, 8)
    assert draw(drop_surrogate(p=0.0, stochastic=StochasticConfig(dropout_p=0.2)), x).shape == (3, 4, 4, 8, 8)


def test_candidates_alike_by_chance_are_no_reason_to_raise():
    fm = Surrogate(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.3)), StateSpec.euler2d())
    x = torch.rand(1, 4, 1, 1)
    alike = 0
    for seed in range(60):
        out = draw(fm, x, IDS[:2], seed=seed)
        alike += int(torch.equal(out[:, 0], out[:, 1]))
    assert alike > 3  # 0.58**4 = 11 % of them are expected to be


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(2, 3, 8, 8), r"x has shape \(2, 3, 8, 8\); expected \[N, 4, S, S\]"),
        (torch.zeros(4, 8, 8), r"x has shape \(4, 8, 8\)"),
        (torch.zeros(0, 4, 8, 8), r"x has shape \(0, 4, 8, 8\)"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.int64), "x is torch.int64; give a floating-point tensor"),
    ],
)
def test_wrong_states_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        draw(drop_surrogate(), x)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="predicts is 'velocity'"):
        Surrogate(Shift(), SPEC, predicts="velocity")
    with pytest.raises(ValueError, match="history is 0"):
        Surrogate(Shift(), SPEC, history=0)
    with pytest.raises(ValueError, match="normalizer has 3 channels and the StateSpec 4"):
        Surrogate(Shift(), SPEC, normalizer=Normalizer(torch.zeros(3), torch.ones(3)))
    with pytest.raises(ValueError, match="stochastic has unknown keys"):
        Surrogate(Shift(), SPEC, stochastic={"droput": True})
    with pytest.raises(ValueError, match="give at least one integer id"):
        draw(drop_surrogate(), euler_state(), torch.arange(0))
    with pytest.raises(ValueError, match="x is on meta and DropNet on cpu"):
        drop_surrogate().deterministic(torch.zeros(1, 4, 8, 8, device="meta"))


def test_forward_is_differentiable():
    x = euler_state().requires_grad_()
    drop_surrogate()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
