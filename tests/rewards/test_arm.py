"""The plan's functions: equal to the sketch at B = 1, per candidate beyond it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import SEED, assert_within
from ttcfast.rewards import arm
from ttcfast.rewards.arm import ARMScorer, ARMWeights, arm_score
from ttcfast.rewards.scorer import ScoreContext
from ttcfast.spec import StateSpec

WEIGHTS = ARMWeights(1.0, 0.5, 2.0, 0.3, 0.7)


class sketch:
    """The formulas of TTC plan, "Analytical Reward Model (ARM)", transcribed; states ``[B, 4, H, W]``, mask of the same shape."""

    @staticmethod
    def integral(field: Tensor, dxdy: float | Tensor) -> Tensor:
        return (field * dxdy).sum(dim=(-2, -1))

    @staticmethod
    def change(a: Tensor, b: Tensor, dxdy: float | Tensor) -> Tensor:
        return (sketch.integral(b, dxdy) - sketch.integral(a, dxdy)).abs()

    @staticmethod
    def mass(a: Tensor, b: Tensor, dxdy: float | Tensor) -> Tensor:
        return sketch.change(a[:, 0], b[:, 0], dxdy)

    @staticmethod
    def momentum(a: Tensor, b: Tensor, dxdy: float | Tensor) -> Tensor:
        return sketch.change(a[:, 1:3].sum(dim=1), b[:, 1:3].sum(dim=1), dxdy)

    @staticmethod
    def energy(a: Tensor, b: Tensor, dxdy: float | Tensor) -> Tensor:
        return sketch.change(a[:, 3], b[:, 3], dxdy)

    @staticmethod
    def boundary(b: Tensor, mask: Tensor) -> Tensor:
        return b[mask].abs().mean()

    @staticmethod
    def pressure(state: Tensor, gamma: float = 1.4) -> Tensor:
        rho, energy = state[:, 0], state[:, 3]
        u, v = state[:, 1] / (rho + 1e-12), state[:, 2] / (rho + 1e-12)
        return (gamma - 1.0) * (energy - 0.5 * rho * (u * u + v * v))

    @staticmethod
    def positivity(b: Tensor) -> Tensor:
        return b[:, 0].clamp_max(0).abs().mean() + sketch.pressure(b).clamp_max(0).abs().mean()

    @staticmethod
    def score(a: Tensor, b: Tensor, dxdy: float | Tensor, mask: Tensor, w: ARMWeights) -> Tensor:
        return -(
            w.w_mass * sketch.mass(a, b, dxdy)
            + w.w_momentum * sketch.momentum(a, b, dxdy)
            + w.w_energy * sketch.energy(a, b, dxdy)
            + w.w_bc * sketch.boundary(b, mask)
            + w.w_positivity * sketch.positivity(b)
        )


def pair(dtype: torch.dtype, b: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """State, candidates with some negative density and pressure, and a mask of space."""
    state = 0.5 + torch.rand(1, 4, 12, 9, dtype=dtype)
    return state, state + 0.7 * torch.randn(b, 4, 12, 9, dtype=dtype), torch.rand(12, 9) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("volume", ["number", "cells"])
def test_every_function_is_the_sketch_for_one_candidate(dtype, volume):
    state, cand, mask = pair(dtype)
    dxdy = 0.3 if volume == "number" else 0.1 + torch.rand(12, 9, dtype=dtype)
    whole = mask.expand(1, 4, -1, -1)
    for found, expected in (
        (arm.mass_conservation_reward(state, cand, dxdy), sketch.mass(state, cand, dxdy)),
        (arm.momentum_conservation_reward(state, cand, dxdy), sketch.momentum(state, cand, dxdy)),
        (arm.energy_conservation_reward(state, cand, dxdy), sketch.energy(state, cand, dxdy)),
        (arm.bc_violation_reward(cand, mask), sketch.boundary(cand, whole).reshape(1)),
        (arm.positivity_reward(cand), sketch.positivity(cand).reshape(1)),
        (arm.compute_pressure(cand), sketch.pressure(cand)),
        (arm.integral(cand, dxdy), sketch.integral(cand, dxdy)),
        (arm_score(state, cand, dxdy, mask, WEIGHTS), sketch.score(state, cand, dxdy, whole, WEIGHTS)),
        (arm_score(state[0], cand, dxdy, mask, WEIGHTS), sketch.score(state, cand, dxdy, whole, WEIGHTS)),
    ):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert_within(found, expected, SEED[dtype], size=float(4 * 108))


def test_masks_of_every_shape_the_sketch_indexes():
    state, cand, _ = pair(torch.float64)
    for mask in (torch.rand(12, 9) < 0.3, torch.rand(4, 12, 9) < 0.3, torch.rand(1, 4, 12, 9) < 0.3):
        whole = mask.expand(1, 4, 12, 9)
        assert_within(arm.bc_violation_reward(cand, mask), sketch.boundary(cand, whole).reshape(1), SEED[torch.float64])
        expected = sketch.score(state, cand, 0.1, whole, WEIGHTS)
        assert_within(arm_score(state, cand, 0.1, mask, WEIGHTS), expected, SEED[torch.float64], size=100)


def test_terms_are_per_candidate_where_the_sketch_averages():
    state, cand, mask = pair(torch.float64, b=5)
    found = arm_score(state[0], cand, 0.1, mask, WEIGHTS)
    for b in range(5):
        assert torch.equal(found[b : b + 1], arm_score(state[0], cand[b : b + 1], 0.1, mask, WEIGHTS))
    assert arm.positivity_reward(cand).mean().item() == pytest.approx(sketch.positivity(cand).item())


def test_a_state_per_candidate():
    state, cand, mask = pair(torch.float64, b=3)
    states = state + 0.1 * torch.randn(3, 4, 12, 9, dtype=torch.float64)
    found = arm_score(states, cand, 0.1, mask, WEIGHTS)
    for b in range(3):
        assert torch.equal(found[b], arm_score(states[b], cand[b : b + 1], 0.1, mask, WEIGHTS)[0])
    assert torch.equal(arm_score(state.expand(3, -1, -1, -1), cand, 0.1, mask, WEIGHTS), arm_score(state[0], cand, 0.1, mask, WEIGHTS))


def test_conservative_pair_scores_about_zero():
    state = 1 + torch.rand(4, 16, 16)
    state[3] += 10
    assert arm_score(state, state.roll(5, -1).unsqueeze(0), 1 / 256, None, ARMWeights()).abs().item() < 1e-6


def test_no_mask_and_empty_mask_have_no_boundary_term():
    state, cand, mask = pair(torch.float64)
    free = ARMWeights(w_bc=0)
    for nothing in (None, torch.zeros_like(mask), torch.zeros(4, 12, 9, dtype=torch.bool)):
        assert torch.equal(arm_score(state, cand, 0.1, nothing, ARMWeights()), arm_score(state, cand, 0.1, mask, free))
        assert arm.bc_violation_reward(cand, nothing).item() == 0


def test_spec_brings_its_own_channels_mask_and_volume():
    spec = StateSpec.well(cell_volume=0.5, boundary_mask=torch.rand(6, 5) < 0.5, boundary_value=1.0)
    state, cand = 1 + torch.rand(5, 6, 5), 1 + torch.rand(3, 5, 6, 5)
    found = arm_score(state, cand, None, None, WEIGHTS, spec=spec)  # type: ignore[arg-type]
    assert torch.equal(found, arm_score(state, cand, 0.5, spec.boundary_mask, WEIGHTS, spec=spec))
    channels = spec.boundary_mask.expand(5, 6, 5)
    torch.testing.assert_close(found, arm_score(state, cand, 0.5, channels, WEIGHTS, spec=spec))


@pytest.mark.parametrize("space", [(8,), (3, 4, 5)])
def test_other_dimensions(space):
    state = 1 + torch.rand(len(space) + 2, *space)
    state[-1] += 10
    assert arm_score(state, state.unsqueeze(0).repeat(2, *[1] * state.ndim), 0.1, None, ARMWeights()).tolist() == [0, 0]
    assert arm.compute_pressure(state.unsqueeze(0)).shape == (1, *space)


def test_score_leads_uphill():
    state, cand, mask = pair(torch.float64, b=2)
    cand.requires_grad_()
    for m in (mask, mask.expand(4, -1, -1)):
        score = arm_score(state[0], cand, 0.1, m, WEIGHTS)
        (grad,) = torch.autograd.grad(score.sum(), cand)
        moved = arm_score(state[0], cand + 1e-6 * grad, 0.1, m, WEIGHTS)
        assert bool((moved > score).all())


def test_bad_candidate_scores_minus_infinity():
    state, cand, mask = pair(torch.float32, b=2)
    cand[1, 2, 3, 4] = float("nan")
    for m in (mask, mask.expand(4, -1, -1)):
        assert arm_score(state[0], cand, 0.1, m, WEIGHTS).isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("B = 0", lambda s, c: arm_score(s[0], c[:0], 0.1, None, WEIGHTS)),
        ("B = 0", lambda s, c: arm_score(s[:0], c[:0], 0.1, None, WEIGHTS)),
        (r"give \[C, \*S\] or \[B, C, \*S\]", lambda s, c: arm_score(s.expand(3, -1, -1, -1), c, 0.1, None, WEIGHTS)),
        ("cell_volume is -0.1", lambda s, c: arm_score(s[0], c, -0.1, None, WEIGHTS)),
        (r"boundary_mask is torch.bool \(9, 12\)", lambda s, c: arm_score(s[0], c, 0.1, torch.ones(9, 12) > 0, WEIGHTS)),
        ("boundary_mask is torch.float32", lambda s, c: arm_score(s[0], c, 0.1, torch.ones(12, 9), WEIGHTS)),
        (r"bc_mask is torch.bool \(3, 12, 9\)", lambda s, c: arm.bc_violation_reward(c, torch.ones(3, 12, 9) > 0)),
        ("cand_tp1 is torch.float64 on cpu and x_t torch.float32", lambda s, c: arm_score(s[0], c.double(), 0.1, None, WEIGHTS)),
        ("cand_tp1 has shape", lambda s, c: arm_score(s[0], c[0, 0], 0.1, None, WEIGHTS)),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    state, cand, _ = pair(torch.float32, b=2)
    with pytest.raises(ValueError, match=message):
        call(state, cand)


def test_budgets_are_taken_off_by_problem():
    spec = StateSpec.fields("q", conserved="all", cell_volume=0.25)
    state, ids = torch.zeros(3, 1, 4, 4), torch.tensor([2, 0, 1])
    candidates = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1, 1).expand(3, 2, 1, 4, 4)
    sources = torch.tensor([4.0, 8.0, 6.0])  # totals of the two candidates: 4 and 8
    context = ScoreContext(0, ids)
    expected = -(torch.tensor([[4.0, 8.0]]) - sources[ids].unsqueeze(1)).abs()
    for budget in (sources, lambda x, context: sources[context.problem_ids]):
        scorer = ARMScorer(spec=spec, scale="absolute", budgets={"q": budget})
        torch.testing.assert_close(scorer.score_group(state, candidates, context), expected)
    constant = ARMScorer(spec=spec, scale="absolute", budgets={"q": 6.0})
    torch.testing.assert_close(constant.score_group(state, candidates, None), torch.full((3, 2), -2.0))


def test_names_that_are_no_penalties_are_refused_at_once():
    with pytest.raises(ValueError, match="weights names 'mass', which is no penalty; the penalties are q, boundary, bounds, divergence"):
        ARMScorer({"mass": 1.0}, spec=StateSpec.fields("q", conserved="all"))
    with pytest.raises(ValueError, match="declares other fields than a gas; score them by ARMScorer"):
        arm_score(torch.zeros(1, 4, 4), torch.zeros(2, 1, 4, 4), 1.0, None, ARMWeights(), spec=StateSpec.fields("q"))


@pytest.mark.parametrize(
    "spec, known", [(StateSpec(), "mass, momentum, energy"), (StateSpec.fields("q", conserved="all"), "q"), (StateSpec.fields("q"), "none")]
)
def test_budgets_of_unknown_names_are_refused_at_once(spec, known):
    with pytest.raises(ValueError, match=f"budgets names 'charge', which is no conserved quantity; they are {known}$"):
        ARMScorer(spec=spec, budgets={"charge": 1.0})


def test_a_budget_without_an_entry_for_a_problem_is_one_clear_error():
    scorer = ARMScorer(spec=StateSpec.fields("q", conserved="all"), budgets={"q": torch.ones(2)})
    with pytest.raises(ValueError, match="the budget of 'q' has 2 entries and problem 5 needs its own"):
        scorer.score_group(torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 1, 4, 4), ScoreContext(0, torch.tensor([5])))
