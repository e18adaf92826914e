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
from ttcfast.ttc.projection import check_projectable, physical, project_conservation, project_declared, without_divergence

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


FLOW = StateSpec.fields(
    "u",
    "v",
    "c",
    "p",
    divergence_free=("u", "v"),
    bounds={"c": (0, 1)},
    conserved="c",
    mean_zero="p",
    spacing=(0.5, 0.25),
    cell_volume=0.125,
)


def flow(n=3, side=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    state = torch.randn(n, 4, side, side + 2, generator=g, dtype=torch.float64)
    state[:, 2] = torch.rand(n, side, side + 2, generator=g, dtype=torch.float64)
    return state, state + 0.5 * torch.randn(state.shape, generator=g, dtype=torch.float64)


def test_declared_fields_get_totals_and_means_by_one_constant_per_channel():
    state, new = flow()
    projected, _ = project_conservation(state, new.clone(), FLOW.replace(bounds={}))
    torch.testing.assert_close(totals(projected)[:, 2], totals(state)[:, 2])
    torch.testing.assert_close(totals(projected)[:, 3], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(projected[:, :2], new[:, :2])
    assert float((projected - new)[:, 2:].flatten(2).std(2).max()) < 1e-14


def test_all_that_is_declared_holds_after_the_projection():
    state, new = flow()
    projected, kept = project_declared(state, new, FLOW)
    assert not kept.any()
    velocity, tracer = projected[:, :2], projected[:, 2]
    torch.testing.assert_close(without_divergence(velocity, FLOW.distances), velocity, atol=1e-12, rtol=0)
    assert float(tracer.min()) >= 0 and float(tracer.max()) <= 1
    torch.testing.assert_close(totals(projected)[:, 2], totals(state)[:, 2])
    torch.testing.assert_close(totals(projected)[:, 3], torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    again, _ = project_declared(state, projected, FLOW)
    torch.testing.assert_close(again, projected, atol=1e-12, rtol=0)


def test_the_nearest_values_within_bounds_are_a_constant_that_is_clipped():
    state, new = flow()
    projected, _ = project_declared(state, new, FLOW)
    change = (projected - new)[:, 2]
    inside = (projected[:, 2] > 0) & (projected[:, 2] < 1)
    for own, free in zip(change, inside, strict=True):  # free cells move alike; clipped ones no further than these
        assert float(own[free].std()) < 1e-9
    torch.testing.assert_close(
        projected[:, 2], (new[:, 2] + change.masked_fill(~inside, -9).flatten(1).amax(1).reshape(-1, 1, 1)).clamp(0, 1)
    )


@pytest.mark.parametrize("low, high", [(0.0, None), (None, 0.3), (None, None)])
def test_open_bounds_work(low, high):
    spec = StateSpec.fields("q", conserved="all", **({} if low is None and high is None else {"bounds": {"q": (low, high)}}))
    state = torch.rand(2, 1, 6, 6) * 0.2
    new = state + 0.3 * torch.randn(2, 1, 6, 6)
    projected, kept = project_declared(state, new, spec)
    assert not kept.any() and bool((projected >= (low if low is not None else -9)).all() and (projected <= (high or 9)).all())
    torch.testing.assert_close(totals(projected), totals(state), rtol=1e-5, atol=1e-5)


def test_totals_that_no_values_within_bounds_have_leave_the_raw_state():
    spec = StateSpec.fields("q", conserved="all", bounds={"q": (0, 1)})
    state, new = torch.full((2, 1, 4, 4), 1.5), torch.rand(2, 1, 4, 4)
    state[1] = 0.5
    projected, kept = project_declared(state, new, spec)
    assert kept.tolist() == [True, False] and torch.equal(projected[0], new[0])


@settings(deadline=None, max_examples=15)
@given(st.integers(3, 9), st.integers(3, 8), st.integers(0, 99))
def test_a_gradient_is_removed_and_a_rotation_stays(nx, ny, seed):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(2, 2, nx, ny, generator=g, dtype=torch.float64)
    free = without_divergence(u, (0.3, 0.7))
    kx, ky = (torch.fft.fftfreq(n, d=h, dtype=torch.float64) for n, h in ((nx, 0.3), (ny, 0.7)))
    kx, ky = (torch.where(k == k.min(), 0.0, k) if len(k) % 2 == 0 else k for k in (kx, ky))
    spectrum = torch.fft.fft2(free)
    assert float((kx[:, None] * spectrum[:, 0] + ky * spectrum[:, 1]).abs().max()) < 1e-10
    torch.testing.assert_close(without_divergence(free, (0.3, 0.7)), free, atol=1e-12, rtol=0)
    assert float((free * (u - free)).sum().abs()) < 1e-9  # orthogonal: the nearest field


@pytest.mark.parametrize(
    "spec, kind, message",
    [
        (StateSpec.fields("q"), "conservation", "declares nothing of that kind; give conserved= or mean_zero="),
        (StateSpec.fields("q", bounds={"q": (0, 1)}), "conservation", "declares nothing of that kind"),
        (StateSpec.fields("q"), "declared", "give conserved=, mean_zero=, bounds= or divergence_free="),
        (FLOW.replace(periodic=False), "declared", "the projection is spectral and needs every axis periodic"),
        (None, "declared", "the model has no StateSpec"),
    ],
)
def test_nothing_to_impose_is_one_clear_error(spec, kind, message):
    with pytest.raises(ValueError, match=message):
        check_projectable(spec, kind)


def test_a_search_imposes_what_is_declared_at_every_step():
    class Drifts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.3)

        def forward(self, x):
            return x + 0.1 * self.drop(x.roll(1, -1)) + 0.02

    state, _ = flow()
    surrogate = Surrogate(Drifts(), FLOW)
    found = TTCGreedy(surrogate, ARMScorer(spec=FLOW), TTCConfig(branching_factor=4, project="declared")).rollout(state, 4)
    for t in range(1, 5):
        torch.testing.assert_close(totals(found[:, t])[:, 2], totals(state)[:, 2])
        assert float(found[:, t, 2].min()) >= 0 and float(found[:, t, 2].max()) <= 1
    drift = conservation_drift(found, FLOW)
    assert set(drift) == {"c"} and float(drift["c"].max()) < 1e-12


def test_states_outside_their_bounds_are_refused_at_the_start():
    surrogate = Surrogate(torch.nn.Dropout(0.3), StateSpec.fields("h", bounds={"h": (5, None)}))
    with pytest.raises(ValueError, match=r"channel 'h' of x0 goes from 1 to 1, outside its bounds \(5.0, None\)"):
        TTCGreedy(surrogate, lambda x, c: c.flatten(1).mean(1), TTCConfig()).rollout(torch.ones(1, 8, 8), 1)


def test_given_channels_are_carried_on_and_may_be_left_out_of_the_models_output():
    spec = StateSpec.fields("mask", "u", given="mask")

    class Moves(torch.nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.whole, self.drop = whole, torch.nn.Dropout(0.5)

        def forward(self, x):
            moved = self.drop(x[:, 1:]) * x[:, :1]
            return torch.cat([x[:, :1] + 7, moved], 1) if self.whole else moved

    state = torch.rand(2, 2, 4, 4)
    results = []
    for whole in (True, False):
        for predicts in ("state", "delta"):
            surrogate = Surrogate(Moves(whole), spec, predicts=predicts)
            found = TTCGreedy(surrogate, lambda x, c: c.flatten(1).mean(1), TTCConfig()).rollout(state, 3)
            assert torch.equal(found[:, :, 0], state[:, :1].expand(-1, 4, -1, -1))
            results.append(found)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("options", [{"project": "declared"}, {"select": "softmax_mean"}, {"refine_steps": 1}])
def test_given_channels_are_bitwise_those_of_the_start_whatever_a_search_does(options):
    spec = StateSpec.fields("mask", "u", "v", given="mask", conserved="u", bounds={"mask": (0.4, 0.6), "u": (0, 2)})
    surrogate = Surrogate(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.Dropout(0.4)), spec)
    state = 0.4 + 0.2 * torch.rand(3, 3, 8, 8)
    search = TTCGreedy(surrogate, ARMScorer(spec=spec), TTCConfig(branching_factor=5, **options))
    found = search.rollout(state, 3)
    assert torch.equal(found[:, :, 0], state[:, :1].expand(-1, 4, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_totals_at_a_bound_are_not_refused_for_rounding(dtype):
    spec = StateSpec.fields("c", conserved="c", bounds={"c": (0.1, 0.7)})
    for value in (0.1, 0.7):
        state = torch.full((1, 1, 7, 9), value, dtype=dtype)
        new = state + 0.3 * torch.randn(1, 1, 7, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)
        projected, impossible = project_declared(state, new, spec)
        assert not impossible.any()
        torch.testing.assert_close(projected, state, rtol=1e-5, atol=1e-6)
    spec = StateSpec.fields("c", conserved="c", bounds={"c": (0, None)})
    state = torch.zeros(1, 1, 7, 9, dtype=dtype)
    projected, impossible = project_declared(state, torch.rand_like(state), spec)
    assert not impossible.any() and float(projected.abs().max()) < 1e-6
