"""ops.arm: every backend, dtype, layout and option against the float64 reference; and what must hold whatever the backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import cases
from tests.ops.arm_problems import (
    DTYPES,
    KINDS,
    MODES,
    PENALTIES,
    SCALES,
    WEIGHTS,
    check_against_reference,
    on,
    problem,
    reference,
    spec_of,
    with_parameters,
)
from ttcfast.ops import native
from ttcfast.ops.arm import ArmScores, arm
from ttcfast.spec import StateSpec


@pytest.mark.parametrize("space", [(1,), (17,), (1025,), (5, 7), (33, 32), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_float64_reference(backend, device, dtype, kind, space):
    components = {1: 1, 2: 2, 3: 3}[len(space)]
    plain = spec_of(kind, len(space), components, cell_volume=0.25)
    state, candidates = problem(plain, space, dtype)
    full = with_parameters(plain, space, state.shape[1], state.shape[0])
    options = list(itertools.product((plain, full), MODES, SCALES))
    if backend == "triton" and device == "cpu":  # a third of a second each in the interpreter: every fifth, another start for each case
        options = options[(KINDS.index(kind) + DTYPES.index(dtype) + sum(space)) % 5 :: 5]
    for spec, mode, scale in options:
        check_against_reference(state, candidates, spec, backend, device, dtype, momentum=mode, scale=scale)


@pytest.mark.parametrize("components", [1, 2, 3])
def test_components_need_not_be_as_many_as_dimensions(backend, device, components):
    for kind in KINDS:
        spec = spec_of(kind, 2, components)
        state, candidates = problem(spec, (4, 5), torch.float32)
        check_against_reference(state, candidates, spec, backend, device, torch.float32, momentum="components")


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_in_memory_changes_no_bit(backend, device, dtype, layout):
    view = cases.LAYOUTS[layout]
    interpreted = backend == "triton" and device == "cpu"
    for space in ((3, 4, 5),) if interpreted else ((19,), (5, 7), (3, 4, 5)):
        spec = spec_of("conserved", len(space), len(space), boundary_mask=torch.rand(space) < 0.5)
        state, candidates = (x.to(device) for x in problem(spec, space, dtype))
        spec = on(spec, device)
        expected = arm(state, candidates, spec, backend=backend)
        for a, b in ((view(state), candidates), (state, view(candidates)), (view(state), view(candidates))):
            found = arm(a, b, spec, backend=backend)
            assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_expanded_candidates_work(backend, device):
    spec = StateSpec.euler2d()
    state, candidates = (x.to(device) for x in problem(spec, (6, 6), torch.float32, b=1))
    found = arm(state, candidates.expand(-1, 4, -1, -1, -1), spec, backend=backend)
    one = arm(state, candidates, spec, backend=backend)
    assert all(torch.equal(x, y.expand(-1, 4)) for x, y in zip(found, one))


@pytest.mark.parametrize("cells", [*cases.SMALL_SIZES, *cases.TILE_EDGES])
def test_sizes_around_lanes_and_tiles(backend, device, cells):
    spec = StateSpec.euler1d(boundary_mask=torch.arange(cells) % 5 == 0)
    state, candidates = problem(spec, (cells,), torch.float32, n=1, b=2)
    check_against_reference(state, candidates, spec, backend, device, torch.float32)


def test_a_million_cells(backend, device):
    if backend == "triton" and device == "cpu":
        return  # the interpreter checks logic on small shapes; the same kernel is tried on this size where there is a GPU
    spec = StateSpec.euler1d(cell_volume=1e-6)
    state, candidates = problem(spec, (cases.LARGE_SIZE,), torch.float32, n=1, b=2)
    check_against_reference(state, candidates, spec, backend, device, torch.float32)


@pytest.mark.parametrize("name", cases.VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_values(backend, device, dtype, name):
    for kind in KINDS:
        spec = spec_of(kind, 1, 1, boundary_mask=torch.arange(19) % 3 == 0)
        state, candidates = problem(spec, (19,), dtype)
        candidates[:, 1] = cases.VALUES[name](tuple(candidates[:, 1].shape), dtype)
        expected = reference(state, candidates, spec)
        found = arm(state.to(device), candidates.to(device), on(spec, device), WEIGHTS, backend=backend)
        assert torch.equal(found.finite[:, 1].cpu(), expected.finite[:, 1])
        assert bool((found.finite[:, 1].cpu() != (name in cases.NON_FINITE)).all())
        assert not any(bool(x.isnan().any()) for x in found)
        if name in cases.NON_FINITE:
            assert bool((found.score[:, 1] == float("-inf")).all())
            assert all(bool((getattr(found, p)[:, 1] == float("inf")).all()) for p in PENALTIES)
        assert bool(found.score[:, [0, 2]].isfinite().all()), "a bad candidate must not touch the others"


def test_finite_candidate_that_overflows_scores_minus_infinity(backend, device):
    spec = StateSpec.euler1d()
    state = torch.ones(1, 3, 8, device=device)
    candidates = state.unsqueeze(1).repeat(1, 2, 1, 1)
    candidates[0, 1, 2] = 3e38
    found = arm(state, candidates, spec, backend=backend)
    assert found.finite.tolist() == [[True, True]]
    assert found.score[0, 1] == float("-inf") and found.score[0, 0] == 0


def test_non_finite_state_makes_every_score_minus_infinity(backend, device):
    state = torch.ones(1, 3, 8, device=device)
    candidates = state.unsqueeze(1).clone()
    state[0, 0, 3] = float("nan")
    for scale in SCALES:
        assert arm(state, candidates, StateSpec.euler1d(), scale=scale, backend=backend).score.item() == float("-inf")


def test_no_problems_gives_no_scores(backend, device):
    n = cases.EMPTY_BATCH
    found = arm(torch.ones(n, 4, 3, 3, device=device), torch.ones(n, 5, 4, 3, 3, device=device), StateSpec.euler2d(), backend=backend)
    assert all(x.shape == (0, 5) for x in found)


@given(first=st.integers(1, 6), seed=st.integers(0, 2**31), space=st.sampled_from([(3,), (70, 70), (9, 11), (4, 3, 5)]))
def test_split_of_candidates_changes_no_bit(first, seed, space):
    check_split("cpu", "cpu", first, seed, space)
    check_split("reference", "cpu", first, seed, space)


@pytest.mark.parametrize("first", [1, 2, 5])
def test_split_of_candidates_changes_no_bit_on_any_backend(backend, device, first):
    check_split(backend, device, first, first, (33, 32))


def check_split(backend, device, first, seed, space) -> None:
    torch.manual_seed(seed)
    spec = spec_of("conserved", len(space), 1, boundary_mask=torch.rand(space) < 0.5)
    state, candidates = (x.to(device) for x in problem(spec, space, torch.float32, b=7))
    whole = arm(state, candidates, on(spec, device), scale="relative", backend=backend)
    parts = [arm(state, c, on(spec, device), scale="relative", backend=backend) for c in (candidates[:, :first], candidates[:, first:])]
    single = arm(state[1:], candidates[1:], on(spec, device), scale="relative", backend=backend)
    for x, a, b, s in zip(whole, *parts, single):
        assert torch.equal(x, torch.cat([a, b], 1)) and torch.equal(x[1:], s)


@pytest.mark.skipif(native.available() is not None, reason=str(native.available()))
@pytest.mark.parametrize("name", ["normal", "constant", "zeros of both signs", "subnormal", "large", "nan", "inf"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(monkeypatch, dtype, kind, name):
    spec, space = spec_of(kind, 2, 2), (67, 65)  # more than a tile, and no multiple of any lanes
    state, _ = problem(spec, space, dtype)
    cand = torch.cat([state.unsqueeze(1), cases.VALUES[name]((2, 2, *state.shape[1:]), dtype)], 1)
    spec = with_parameters(spec, space, state.shape[1], 2)
    levels = []
    for level in range(len(native.module().cpu_levels)):
        monkeypatch.setattr(native, "highest_level", level)
        levels.append(arm(state, cand, spec, WEIGHTS, backend="cpu"))
    assert native.module().cpu_levels[0] == "generic"
    for found in levels[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, levels[0]))


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_number_of_threads_changes_no_bit(name):
    spec = StateSpec.euler2d()
    state, candidates = problem(spec, (128, 129), torch.float32, n=1, b=5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(arm(state, candidates, spec, scale="relative", backend=name))
            found.append(ArmScores(*(x[:, :1] for x in arm(state, candidates[:, :1], spec, scale="relative", backend=name))))
    finally:
        torch.set_num_threads(before)
    for other in found:
        assert all(torch.equal(x[:, : y.shape[1]], y) for x, y in zip(found[0], other))


def test_rolled_state_conserves_everything(backend, device):
    spec = StateSpec.euler2d()
    state = (1 + torch.rand(2, 4, 16, 16)).to(device)
    found = arm(state, state.roll(3, -1).unsqueeze(1), spec, scale="relative", backend=backend)
    for name in ("mass", "momentum", "energy"):
        assert float(getattr(found, name).max()) < 1e-7


def test_tiny_residual_on_a_large_state_is_exact(backend, device):
    """The difference of two float32 integrals is off by its own size here."""
    state = torch.full((1, 3, 4096), 1.5)
    state += 0.1 * torch.rand_like(state)
    candidates = (state + torch.finfo(torch.float32).eps).unsqueeze(1)
    expected = float((candidates[0, 0, 0].double() - state[0, 0].double()).sum())
    found = arm(state.to(device), candidates.to(device), StateSpec.euler1d(), backend=backend)
    assert found.mass.item() == pytest.approx(expected, rel=1e-6)


@given(shift=st.floats(-2, 2), volume=st.floats(0.1, 10))
def test_uniform_shift_of_density_is_that_much_mass(shift, volume):
    state = torch.ones(1, 4, 6, 5, dtype=torch.float64)
    candidates = state.unsqueeze(1).clone()
    candidates[:, :, 0] += shift
    found = arm(state, candidates, StateSpec.euler2d(cell_volume=volume))
    assert found.mass.item() == pytest.approx(abs(shift) * volume * 30, rel=1e-9, abs=1e-12)
    assert found.momentum.item() == found.energy.item() == 0


@given(order=st.permutations(range(5)))
def test_order_of_candidates_only_orders_the_scores(order):
    spec = StateSpec.euler2d()
    torch.manual_seed(1)
    state, candidates = problem(spec, (5, 5), torch.float32, b=5)
    found, shuffled = arm(state, candidates, spec), arm(state, candidates[:, order], spec)
    assert all(torch.equal(x[:, order], y) for x, y in zip(found, shuffled))


def test_momentum_modes_are_what_they_say():
    state = torch.ones(1, 4, 2, 2)
    candidates = state.unsqueeze(1).clone()
    candidates[:, :, 1] += 3
    candidates[:, :, 2] -= 4
    found = {m: arm(state, candidates, StateSpec.euler2d(cell_volume=0.25), momentum=m).momentum.item() for m in MODES}
    assert found == pytest.approx({"sum": 1.0, "components": 7.0, "norm": 5.0})


def test_relative_scale_cannot_vanish():
    state = torch.zeros(1, 4, 3, 3)
    found = arm(state, state.unsqueeze(1), StateSpec.euler2d(), scale="relative")
    assert all(bool((getattr(found, p) == 0).all()) for p in PENALTIES) and found.score.item() == 0


def test_relative_momentum_is_scaled_by_mass_times_speed():
    """rho = 2, |u| = 3, p = 2 / 1.4 so that c = 1: the denominator is 2 (3 + 1) per volume; total momentum would be 0."""
    state = torch.zeros(1, 3, 4, dtype=torch.float64)
    state[:, 0], state[:, 1] = 2.0, torch.tensor([6.0, -6.0, 6.0, -6.0])
    state[:, 2] = 2 / 1.4 / 0.4 + 9
    candidates = state.unsqueeze(1).clone()
    candidates[:, :, 1] += 1
    assert arm(state, candidates, StateSpec.euler1d(), scale="relative").momentum.item() == pytest.approx(1 / 8)
