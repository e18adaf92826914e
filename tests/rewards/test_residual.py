"""Rewards by a residual: exact steps leave little, by the right order; nearer candidates score higher; gradients; wrong input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ttcfast
from tests.small_run import arm, problems, surrogate
from ttcfast.core.context import StepContext
from ttcfast.physics import EulerSolver, VorticitySolver, initial_conditions, to_primitive
from ttcfast.physics.navier_stokes import LENGTH, random_vorticity, spectral_resampling
from ttcfast.rewards.common import EulerResidualScorer, Residual, Scorer, ScorerList, VorticityResidual
from ttcfast.runtime.lent import ChangedInputError
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.refine import refine

FLOW = {"viscosity": 0.05, "drag": 0.1, "wave_number": 2, "amplitude": 1.0}
DT = 0.05


def entropy_wave(cells: int, time: float, ndim: int = 2, **options: Any) -> Tensor:
    """The preset's wave moved by a time, an exact solution; density waves of one cell width per time 1/cells move by whole cells."""
    shift = round(time * cells)
    assert shift == pytest.approx(time * cells)
    wave = initial_conditions.entropy_wave(1, (cells,) * ndim, **options)
    return wave.roll((shift,) * ndim, tuple(range(2, 2 + ndim)))


def eddies(cells: int, **options: Any) -> Tensor:
    return random_vorticity(2, cells, seed=0, peak=2, width=0.5, rms=2.0, **options)


@pytest.fixture(scope="module")
def gas() -> tuple[Tensor, Tensor]:
    """State and truth of a shear layer, computed on 64x64 cells and averaged to 32x32: ``[2, 4, 32, 32]`` each."""
    start = initial_conditions.kelvin_helmholtz(2, (64, 64), seed=3)
    found = EulerSolver(StateSpec.euler2d(), compile=False, dtype=torch.float64).rollout(start, [0.1, 0.1 + DT])
    averaged = found.unflatten(4, (32, 2)).unflatten(3, (32, 2)).mean((4, 6))
    return averaged[:, 0], averaged[:, 1]


@pytest.fixture(scope="module")
def flow() -> tuple[Tensor, Tensor]:
    """State and truth of developed Kolmogorov flow, computed on 64x64 cells and seen on 32x32: ``[2, 1, 32, 32]`` each."""
    solver = VorticitySolver(**FLOW, dtype=torch.float64)
    found = spectral_resampling(solver.rollout(random_vorticity(2, 64, seed=1), [1.0, 1.0 + 2 * DT]), 32)
    return found[:, 0], found[:, 1]


def euler(**options: Any) -> EulerResidualScorer:
    return EulerResidualScorer(DT, 1 / 32, **options)


def vorticity() -> VorticityResidual:
    return VorticityResidual(2 * DT, **FLOW)


def near(truth: Tensor, state: Tensor, sizes: Tensor, seed: int = 0) -> Tensor:
    """The truth with smooth errors of these sizes, relative to the step, ``[N, B, C, n, n]``."""
    n, c, cells = len(truth), truth.shape[1], truth.shape[-1]
    noise = random_vorticity(n * len(sizes) * c, cells, seed=seed, rms=1.0).view(n, len(sizes), c, cells, cells)
    step = (truth - state).square().mean((2, 3), keepdim=True).sqrt().unsqueeze(1)
    return truth.unsqueeze(1) + sizes.view(-1, 1, 1, 1) * step * noise


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize(("form", "order"), [("simpson", 4), ("finite_volume", 2)])
@pytest.mark.parametrize("ndim", [1, 2])
def test_the_residual_of_an_exact_step_falls_with_the_order_of_its_differences(form, order, ndim):
    """Relative to the step, and with dt proportional to the cell; a limiter costs the second order half an order at extrema."""
    spec = {1: StateSpec.euler1d, 2: StateSpec.euler2d}[ndim]()
    left = []
    for cells in (32, 64):
        scorer = EulerResidualScorer(2 / cells, 1 / cells, spec=spec, form=form)
        left.append(-float(scorer.score(entropy_wave(cells, 0.0, ndim), entropy_wave(cells, 2 / cells, ndim))))
    assert math.log2(left[0] / left[1]) == pytest.approx(order, abs=0.5)
    assert left[1] < 0.02


def test_the_residual_of_vorticity_falls_with_the_fourth_order_of_simpsons_rule():
    start = VorticitySolver(**FLOW, longest=0.005, dtype=torch.float64).rollout(eddies(64), [0.2])[:, 0]
    left = []
    for dt in (0.1, 0.05):
        truth = VorticitySolver(**FLOW, longest=dt / 32, dtype=torch.float64).rollout(start, [dt])
        left.append(-VorticityResidual(dt, **FLOW).score(start, truth))
    assert torch.log2(left[0] / left[1]).flatten().tolist() == pytest.approx([4.0, 4.0], abs=0.3) and float(left[1].max()) < 1e-3


def test_vorticity_on_a_square_of_another_length_is_the_same_flow():
    """A Taylor-Green array of wave length 1/2 on the unit square decays exactly as its viscosity says."""
    x = torch.arange(16).double() / 16
    state = (4 * math.pi * x).sin()[:, None] * (4 * math.pi * x).sin()
    truth = state * math.exp(-(2 * (4 * math.pi) ** 2 * 1e-3 + 0.1) * 0.1)
    scorer = VorticityResidual(0.1, viscosity=1e-3, drag=0.1, length=1.0)
    assert float(scorer.score(state[None], truth[None, None])) > -1e-6
    assert float(VorticityResidual(0.1, viscosity=1e-3, drag=0.1).score(state[None], truth[None, None])) < -0.5


@pytest.mark.parametrize("form", ["simpson", "finite_volume"])
def test_a_nearer_gas_state_scores_higher(gas, form):
    state, truth = gas
    candidates = near(truth, state, torch.logspace(-1.3, 0.3, 12))
    scores, errors = euler(form=form).score(state, candidates), (candidates - truth.unsqueeze(1)).square().mean((2, 3, 4))
    for i in range(2):
        assert rank_correlation(scores[i], -errors[i]) > 0.9
    late = state.unsqueeze(1) + torch.tensor([0.0, 0.5, 1.0, 1.5]).view(-1, 1, 1, 1) * (truth - state).unsqueeze(1)
    assert euler(form=form).score(state, late).argmax(1).tolist() == [2, 2]


def test_nearer_vorticity_scores_higher(flow):
    state, truth = flow
    candidates = near(truth, state, torch.logspace(-2, 0.3, 12))
    scores, errors = vorticity().score(state, candidates), (candidates - truth.unsqueeze(1)).square().mean((2, 3, 4))
    for i in range(2):
        assert rank_correlation(scores[i], -errors[i]) > 0.95
    late = state.unsqueeze(1) + torch.tensor([0.0, 0.5, 1.0, 1.5]).view(-1, 1, 1, 1) * (truth - state).unsqueeze(1)
    assert vorticity().score(state, late).argmax(1).tolist() == [2, 2]


@pytest.mark.parametrize("form", ["simpson", "finite_volume"])
def test_scores_do_not_depend_on_units_or_layout(gas, form):
    """Other units of mass, length and time leave the score; so do primitive variables, a gamma per problem and another channel order."""
    state, truth = gas
    candidates = near(truth, state, torch.tensor([0.0, 0.3]))
    scores = euler(form=form).score(state, candidates)
    mass, length, time = 3.0, 50.0, 7.0
    units = torch.tensor([mass / length**3, *[mass / length**2 / time] * 2, mass / length / time**2], dtype=torch.float64).view(4, 1, 1)
    scorer = EulerResidualScorer(DT * time, (length / 32, length / 32), form=form)
    torch.testing.assert_close(scorer.score(state * units, candidates * units), scores, rtol=1e-8, atol=1e-10)

    primitive = to_primitive(candidates.flatten(0, 1)).unflatten(0, (2, 2))
    scorer = euler(form=form, spec=StateSpec.pdegym(gamma=torch.tensor([1.1, 1.4, 1.4])))
    context = StepContext(0, torch.tensor([1, 2]))
    torch.testing.assert_close(scorer.score(to_primitive(state), primitive, context=context), scores)
    reordered = euler(form=form, spec=StateSpec(density=3, momentum=(1, 2), energy=0))
    torch.testing.assert_close(reordered.score(state[:, [3, 1, 2, 0]], candidates[:, :, [3, 1, 2, 0]]), scores)


@pytest.mark.parametrize("form", ["simpson", "finite_volume"])
def test_walls_return_the_flow_that_a_mirror_would(form):
    """Half of a mirrored domain between walls has the residual of the whole periodic one."""
    half = initial_conditions.gauss_vortices(1, (16, 32), seed=0)
    mirrored = half.flip(2) * torch.tensor([1.0, -1.0, 1.0, 1.0]).view(4, 1, 1)
    whole = torch.cat([half, mirrored], 2)
    candidate = whole.roll((1, 1), (2, 3)) * 0.5 + whole * 0.5
    candidate = torch.cat([candidate[:, :, :16], candidate[:, :, :16].flip(2) * torch.tensor([1.0, -1.0, 1.0, 1.0]).view(4, 1, 1)], 2)
    walls = euler(form=form, spec=StateSpec.euler2d(periodic=(False, True), closed=True))
    assert walls.boundary == ("reflecting", "periodic")
    inside = walls.residual(half, candidate[:, None, :, :16])
    torch.testing.assert_close(inside, euler(form=form).residual(whole, candidate[:, None])[:, :, :, :16])


def scorers() -> list[Any]:
    own = Residual(lambda x, c, context: c - x.unsqueeze(1) * 1.1)
    return [("gas", euler()), ("gas", euler(form="finite_volume")), ("flow", vorticity()), ("gas", own)]


@pytest.mark.parametrize(("data", "scorer"), scorers())
def test_gradients_agree_with_finite_differences_and_refinement_lowers_the_residual(data, scorer, request):
    state, truth = request.getfixturevalue(data)
    candidates = near(truth, state, torch.tensor([0.3, 0.6])).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(state, candidates).sum(), candidates)
    given, step = candidates.detach(), 1e-6
    for seed in range(3):
        along = torch.randn(given.shape, dtype=given.dtype, generator=torch.Generator().manual_seed(seed)) * (truth - state).std()
        ahead, behind = (scorer.score(state, given + sign * step * along).sum() for sign in (1, -1))
        assert float((gradient * along).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=2e-3)
    moved = refine(state, given, scorer, None, steps=3, lengths=(0.25, 0.5))
    scores = scorer.score(state, moved)
    assert (scores[:, 2:].unflatten(1, (-1, 2)).amax(1) > scores[:, :2]).all()


@pytest.mark.parametrize(("data", "scorer"), scorers()[:3])
def test_rounding_spreads_scores_less_than_the_floor_and_errors_do_more(data, scorer, request):
    state, truth = request.getfixturevalue(data)
    truth = truth.float()
    rounded = torch.stack([truth.nextafter(torch.full_like(truth, math.inf) * (torch.rand_like(truth) - 0.5)) for _ in range(16)], 1)
    scores, floor = scorer.score(state.float(), rounded), scorer.spread_floor(state.float(), None)
    assert ((scores.amax(1) - scores.amin(1)) < floor).all()
    known = scorer.score(state, near(truth.double(), state, torch.tensor([0.1, 0.2])))
    assert ((known[:, 0] - known[:, 1]) > 10 * floor).all()


@pytest.mark.parametrize(("data", "scorer"), scorers())
def test_candidates_that_are_not_finite_or_lost_their_density_do_not_spoil_the_others(data, scorer, request):
    state, truth = request.getfixturevalue(data)
    candidates = near(truth, state, torch.tensor([0.1, 0.1, 0.2]))
    alone = scorer.score(state, candidates[:, 2:])
    candidates[:, 0, 0, 3, 4], candidates[:, 1, 0, 5, 5] = math.nan, -30.0
    scores = scorer.score(state, candidates)
    assert (scores[:, 0] == -math.inf).all() and scores[:, 1].isfinite().all()
    torch.testing.assert_close(scores[:, 2:], alone)
    assert (scores[:, 1] < scores[:, 2]).all()
    assert not scorer.ascent(state, candidates, None)[:, 0].any()


def test_a_state_at_rest_has_finite_scores():
    rest = torch.tensor([1.0, 0.0, 0.0, 2.5]).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    assert float(euler().score(rest, rest.unsqueeze(1))) == 0
    assert -math.inf < float(euler().score(rest, rest.unsqueeze(1) * 1.01)) < 0
    still = torch.zeros(1, 1, 16, 16)
    assert float(VorticityResidual(0.1, viscosity=0.1).score(still, still.unsqueeze(1))) == 0


@pytest.mark.parametrize("norm", ["square", "absolute"])
def test_a_field_counts_by_its_mean_and_a_penalty_as_it_is(norm):
    state, candidates = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 3, 8, 8)
    seen = []

    def difference(x_t: Tensor, c: Tensor, context: StepContext | None) -> Tensor:
        seen.append(context)
        return c[:, :, 0] - x_t[:, None, 1]

    field = difference(state, candidates, None).flatten(2)
    penalty = field.square().mean(2) if norm == "square" else field.abs().mean(2)
    context = StepContext(3, torch.tensor([4, 5]))
    torch.testing.assert_close(Residual(difference, norm=norm).score(state, candidates, context=context), -penalty)
    assert seen[-1] is context
    torch.testing.assert_close(Residual(lambda x, c, _: penalty).score(state, candidates), -penalty)


def test_it_stands_in_a_list_beside_arm_and_a_learned_reward_and_in_a_rollout():
    class Learned(Scorer):
        maximum = 0.0

        def score_group(self, state: Tensor, candidates: Tensor, context: Any) -> Tensor:
            return -candidates.square().mean((2, 3, 4))

    def moved(x_t: Tensor, candidates: Tensor, context: StepContext | None) -> Tensor:
        return candidates - x_t.roll(1, -2).unsqueeze(1)

    given, model = problems(steps=2), surrogate()
    state, truth = given.truth[:2, 0], given.truth[:2, 1]
    together = ScorerList([arm(), Learned(), Residual(moved)], zscore=True)
    candidates = torch.stack([truth, truth + 0.1, truth * 1.1], 1)
    assert list(together.breakdown(state, candidates)) == ["ARMScorer", "Learned", "moved"]
    torch.testing.assert_close(together.breakdown(state, candidates)["moved"][:, 0], torch.zeros(2))
    for reward in (together, Residual(moved)):
        result = TTCGreedy(model, reward, TTCConfig(branching_factor=3, refine_steps=1)).rollout(state, 2, return_info=True)
        assert result.trajectory.isfinite().all()
    refined = ttcfast.improve(model, state, 1, reward=Residual(moved), branching_factor=3, refine=2).trajectory[:, -1]
    plain = ttcfast.improve(model, state, 1, reward=Residual(moved), branching_factor=3).trajectory[:, -1]
    assert (refined - truth).square().mean() < 0.5 * (plain - truth).square().mean()


@pytest.mark.parametrize(
    "opaque",
    [
        lambda x, c, context: c.detach() - x.unsqueeze(1),
        lambda x, c, context: torch.from_numpy(c.numpy() - x.unsqueeze(1).numpy()),
        lambda x, c, context: x.new_zeros(1, requires_grad=True) + c.detach() - x.unsqueeze(1),
    ],
)
def test_a_residual_without_gradient_chooses_and_refuses_to_refine(opaque):
    state, candidates = torch.zeros(1, 2, 8, 8), torch.arange(3.0).view(1, 3, 1, 1, 1).expand(1, 3, 2, 8, 8)
    torch.testing.assert_close(Residual(opaque).score(state, candidates).detach(), -torch.tensor([[0.0, 1.0, 4.0]]))
    with pytest.raises(ValueError, match=r"residual fn is not differentiable in the candidates.*refine_steps=0"):
        Residual(opaque).ascent(state, candidates, None)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x, c, _: c[:, 0], r"torch.float32 of shape \(2, 1, 8, 8\) for 2 states with 3 candidates; .* \[2, 3, ...\]"),
        (lambda x, c, _: c.mean(), r"torch.float32 of shape \(\)"),
        (lambda x, c, _: c > 0, "torch.bool"),
        (lambda x, c, _: 0.5, "a float"),
        (lambda x, c, _: c[..., :0], r"torch.float32 of shape \(2, 3, 1, 8, 0\)"),
    ],
)
def test_another_shape_is_one_clear_error(returned, said):
    with pytest.raises(ValueError, match=f"residual fn returned {said}"):
        Residual(returned).score(torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 1, 8, 8))


def test_a_function_that_writes_into_its_input_is_named():
    def spoils(x_t: Tensor, candidates: Tensor, context: Any) -> Tensor:
        return candidates.sub_(x_t.unsqueeze(1))

    with pytest.raises(ChangedInputError, match="residual spoils changed the candidates"):
        Residual(spoils).score(torch.ones(2, 1, 8, 8), torch.zeros(2, 3, 1, 8, 8))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Residual(lambda x, c: c), TypeError, r"fn\(x_t, candidates, context\)"),
        (lambda: Residual(3.0), TypeError, "fn is float"),  # type: ignore[arg-type]
        (lambda: Residual(lambda x, c, _: c, norm="max"), ValueError, "norm is 'max'"),  # type: ignore[arg-type]
        (lambda: EulerResidualScorer(0.0, 0.1), ValueError, "dt is 0.0"),
        (lambda: EulerResidualScorer(0.1, (0.1, 0.1, 0.1)), ValueError, "one for each of 2 axes"),
        (lambda: EulerResidualScorer(0.1, (0.1, -0.1)), ValueError, "cell is -0.1"),
        (lambda: EulerResidualScorer(0.1, 0.1, form="upwind"), ValueError, "form is 'upwind'"),  # type: ignore[arg-type]
        (lambda: EulerResidualScorer(0.1, 0.1, boundary="open"), ValueError, "boundary is 'open'"),
        (lambda: EulerResidualScorer(0.1, 0.1, spec=StateSpec.fields("w")), ValueError, "VorticityResidual or Residual"),
        (lambda: VorticityResidual(0.1, viscosity=0.0), ValueError, "viscosity is 0"),
        (lambda: VorticityResidual(0.1, viscosity=0.1, length=-1.0), ValueError, "length is -1"),
        (lambda: VorticityResidual(0.1, viscosity=0.1).score(torch.zeros(1, 8, 9), torch.zeros(2, 1, 8, 9)), ValueError, "8, 9"),
        (
            lambda: VorticityResidual(LENGTH, viscosity=0.1, channel=1).score(torch.zeros(1, 8, 8), torch.zeros(2, 1, 8, 8)),
            ValueError,
            "channel 1",
        ),
        (lambda: EulerResidualScorer(0.1, 0.1).score(torch.zeros(1, 8, 8), torch.zeros(2, 1, 8, 8)), ValueError, "at least 4"),
    ],
)
def test_wrong_input_is_one_clear_error(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vorticity_in_half_precision_is_scored(dtype):
    state = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    candidates = state.unsqueeze(1) + torch.tensor([0.1, 0.5]).reshape(1, 2, 1, 1, 1) * torch.randn(1, 2, 1, 16, 16)
    scorer = VorticityResidual(0.1, viscosity=0.01)
    found = scorer.score(state.to(dtype), candidates.to(dtype))
    torch.testing.assert_close(found.float(), scorer.score(state.to(dtype).float(), candidates.to(dtype).float()), rtol=1e-2, atol=1e-2)


def test_vorticity_at_rest_has_finite_scores_that_tell_candidates_apart():
    still = torch.zeros(1, 1, 16, 16)
    candidates = torch.tensor([0.0, 0.001, 1.0]).reshape(1, 3, 1, 1, 1) * torch.randn(1, 1, 1, 16, 16)
    found = VorticityResidual(0.1, viscosity=0.1).score(still, candidates)
    assert found.isfinite().all() and found[0, 0] == 0 and found[0, 0] > found[0, 1] > found[0, 2]
