import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.surrogates import Foreign, Shift, drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.metrics import conservation_drift
from ttcfast.rewards.common import ARMScorer
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.projection import physical, project_conservation

SPEC = StateSpec.euler2d()
ARM = ARMScorer(ARMWeights(), 1.0, momentum="sum", scale="relative")
REFUSED = [
    (StateSpec.pdegym(), "the states are primitive"),
    (StateSpec.euler2d(periodic=False), r"the domain is open \(periodic=False, closed=False\)"),
    (StateSpec.euler2d(periodic=(True, False)), "the domain is open"),
]


def totals(x, volume=1.0):
    return (x.double() * volume).flatten(2).sum(2)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.integers(0, 99))
def test_totals_become_those_of_the_state_and_nothing_else_changes(n, ndim, dtype, per_cell, seed):
    g = torch.Generator().manual_seed(seed)
    spec = [StateSpec.euler1d, StateSpec.euler2d, StateSpec.euler3d][ndim - 1]()
    space = [6] * ndim
    volume = torch.rand(space, generator=g, dtype=torch.float64) + 0.5 if per_cell else 0.5
    spec = spec.replace(cell_volume=volume)
    state = torch.rand(n, spec.num_channels, *space, generator=g, dtype=dtype) * 0.1 + 1.0
    new = state + 0.01 * torch.randn(state.shape, generator=g, dtype=dtype) + 0.005
    projected, kept = project_conservation(state, new, spec)
    before, after = totals(state, volume), totals(projected, volume)
    assert (after - before).abs().max() <= 4 * torch.finfo(dtype).eps * before.abs().max()
    change = projected - new
    assert bool((change.flatten(2).std(2) < 10 * torch.finfo(dtype).eps).all())  # one constant per channel
    assert not kept.any() and projected.dtype == dtype


def test_what_conserves_already_is_left_alone():
    x = euler_state(dtype=torch.float64)
    projected, kept = project_conservation(x, x.roll(1, -1), SPEC)
    assert (projected - x.roll(1, -1)).abs().max() < 1e-14 and not kept.any()


def test_only_conserved_channels_are_touched():
    spec = StateSpec.euler2d(extra=(4,), periodic=False, closed=True)
    state = torch.cat([euler_state(), torch.zeros(3, 1, 8, 8)], 1)
    new = state + 0.1
    projected, _ = project_conservation(state, new, spec)
    torch.testing.assert_close(projected[:, [0, 3]], state[:, [0, 3]])
    assert torch.equal(projected[:, [1, 2, 4]], new[:, [1, 2, 4]])  # walls exchange momentum; a tracer is nobody's business


def test_a_projection_that_would_make_density_negative_is_not_done():
    state = euler_state(2)
    new = state.clone()
    new[0, 0] = 0.01  # nearly empty in most cells, with one that holds more than all the mass there was
    new[0, 1:3], new[0, 0, 0, 0] = 0.0, 200.0
    new[1] += 0.01
    projected, kept = project_conservation(state, new, SPEC)
    assert kept.tolist() == [True, False]
    assert torch.equal(projected[0], new[0]) and physical(projected, SPEC).all()


def test_a_state_that_was_not_positive_is_projected_all_the_same():
    state = euler_state(1)
    new = state + 0.1
    new[0, 0, 0, 0] = -1.0
    projected, kept = project_conservation(state, new, SPEC)
    assert not kept.any()
    torch.testing.assert_close(totals(projected), totals(state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec, message", REFUSED)
def test_open_domains_and_primitive_states_are_refused(spec, message):
    with pytest.raises(ValueError, match=f"project is 'conservation' but {message}"):
        project_conservation(euler_state(), euler_state(), spec)
    with pytest.raises(ValueError, match=message):
        TTCGreedy(Surrogate(Shift(), spec), ARM, TTCConfig(project="conservation"))


def test_a_model_without_a_layout_is_refused_and_one_with_it_is_not():
    cfg = TTCConfig(branching_factor=2, project="conservation")
    with pytest.raises(ValueError, match="the model has no StateSpec; wrap it in a Surrogate"):
        TTCGreedy(Foreign(), ARM, cfg)
    fm = Foreign()
    fm.spec = SPEC
    x0 = euler_state()
    out = TTCGreedy(fm, ARM, cfg).rollout(x0, 3)
    torch.testing.assert_close(totals(out[:, -1]), totals(x0), rtol=1e-7, atol=1e-4)


@pytest.mark.parametrize("b", [1, 4])
def test_a_projected_rollout_keeps_every_total_and_the_score_sees_raw_candidates(b):
    x0, fm = euler_state(), drop_surrogate(scale=0.1)
    raw = TTCGreedy(fm, ARM, TTCConfig(branching_factor=b)).rollout(x0, 10, return_info=True)
    r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=b, project="conservation")).rollout(x0, 10, return_info=True)
    for name, d in conservation_drift(r.trajectory, SPEC).items():
        assert d.max() < 1e-6 < conservation_drift(raw.trajectory, SPEC)[name].max() / 10, name
    assert torch.equal(r.scores[:, 0], raw.scores[:, 0]) and torch.equal(r.chosen[:, 0], raw.chosen[:, 0])
    assert r.unprojected.sum() == 0


def test_a_kept_raw_state_is_counted():
    class Emptying(Shift):
        def forward(self, x):
            out = x.clone()
            out[:, 0], out[:, 1:3], out[:, 3] = 0.01, 0.0, 2.5
            out[:, 0, 0, 0] = 200.0
            return out

    fm = Surrogate(Emptying(), SPEC)
    r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=1, project="conservation")).rollout(euler_state(2), 1, return_info=True)
    assert r.unprojected.all() and r.interventions()["unprojected"] == 2
