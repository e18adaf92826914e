import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.surrogates import euler_state, shifted
from ttcfast.ops.arm import arm
from ttcfast.rewards.arm import arm_score
from ttcfast.rewards.common import ARMScorer, OracleScorer, ScoreContext, Scorer, ScorerList, as_scorer
from ttcfast.spec import ARMWeights, StateSpec


class MeanScorer(Scorer):
    """Exactly known: the mean of the candidate minus that of the state."""

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return candidates.flatten(2).mean(2) - state.flatten(1).mean(1, keepdim=True)


def mean_score(x_t: Tensor, cand: Tensor) -> Tensor:
    return cand.flatten(1).mean(1) - x_t.flatten(1).mean(1)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from(["base", "function"]))
def test_every_layout_gives_the_same_scores(n, b, ndim, kind):
    torch.manual_seed(0)
    state, cands = torch.rand(n, 4, *[3] * ndim), torch.rand(n, b, 4, *[3] * ndim)
    scorer: Scorer = MeanScorer()
    scorer.ndim = ndim
    scorer = scorer if kind == "base" else as_scorer(mean_score, ndim=ndim)
    many = scorer(state, cands)
    assert many.shape == (n, b)
    for i in range(n):
        torch.testing.assert_close(scorer.score(state[i], cands[i]), many[i])
        torch.testing.assert_close(scorer(state[i].expand_as(cands[i]), cands[i]), many[i])  # as the sketch calls it
    if n == b:
        torch.testing.assert_close(scorer(state, cands[0]), torch.stack([scorer(state[i], cands[0, i : i + 1])[0] for i in range(n)]))


def test_layouts_that_do_not_fit_are_refused():
    s, x = MeanScorer(), euler_state()
    with pytest.raises(ValueError, match=r"x_t has shape \(3, 4, 8, 8\) and cand_tp1 \(2, 5, 4, 8, 8\)"):
        s(x, torch.zeros(2, 5, 4, 8, 8))
    with pytest.raises(ValueError, match=r"cand_tp1 is torch.float64 on cpu and x_t torch.float32"):
        s(x, torch.zeros(3, 5, 4, 8, 8, dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="Scorer has neither score_group"):
        Scorer()(x, x.unsqueeze(1))


def test_a_context_is_given_to_those_who_take_it():
    seen = []

    def batched(x_t, cand_tp1, *, context=None):
        seen.append(context)
        return cand_tp1.flatten(2).mean(2)

    state, cands, where = euler_state(), euler_state(6).reshape(3, 2, 4, 8, 8), ScoreContext(4, torch.arange(3))
    as_scorer(batched)(state, cands, context=where)
    assert seen == [where]
    assert as_scorer(mean_score)(state, cands, context=where).shape == (3, 2)


def test_the_sketchs_own_scorer_class_works():
    class Sketch(Scorer):
        def score(self, x_t, cand_tp1):
            return mean_score(x_t, cand_tp1)

    class Module(nn.Module):
        def forward(self, state_t, cand_tp1):
            return mean_score(state_t, cand_tp1)

    state, cands = euler_state(), euler_state(6).reshape(3, 2, 4, 8, 8)
    expected = MeanScorer()(state, cands)
    torch.testing.assert_close(Sketch()(state[0].expand_as(cands[0]), cands[0]), expected[0])
    for scorer in (Sketch(), Module()):
        torch.testing.assert_close(as_scorer(scorer)(state, cands), expected)


def test_what_cannot_score_is_refused():
    with pytest.raises(TypeError, match="scorer is a int; give a Scorer"):
        as_scorer(3)
    with pytest.raises(ValueError, match="MeanScorer scores states with 2 space axes; the model's have 1"):
        as_scorer(MeanScorer(), ndim=1)
    with pytest.raises(ValueError, match=r"scorer <lambda> returned shape \(\); expected one score per candidate, shape \(2,\)"):
        as_scorer(lambda x, c: c.mean())(euler_state(1), euler_state(2).unsqueeze(0))
    with pytest.raises(ValueError, match="returned a float"):
        as_scorer(lambda x, c: 1.0)(euler_state(1), euler_state(2).unsqueeze(0))


def candidates(n: int = 3, b: int = 4) -> tuple[Tensor, Tensor]:
    state = euler_state(n)
    return state, state.unsqueeze(1) + 0.01 * torch.randn(n, b, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("momentum", ["sum", "components", "norm"])
@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_arm_scorer_is_the_operation(momentum, scale):
    state, cands = candidates()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[0] = True
    w = ARMWeights(w_bc=0.3)
    scorer = ARMScorer(w, 0.5, mask, momentum=momentum, scale=scale)
    spec = StateSpec.euler2d(cell_volume=0.5, boundary_mask=mask)
    expected = arm(state, cands, spec, w, momentum=momentum, scale=scale)
    torch.testing.assert_close(scorer(state, cands), expected.score)
    torch.testing.assert_close(scorer.terms(state, cands).mass, expected.mass)
    if (momentum, scale) == ("sum", "absolute"):
        torch.testing.assert_close(
            scorer(state[0].expand_as(cands[0]), cands[0]), arm_score(state[0].expand_as(cands[0]), cands[0], 0.5, mask, w)
        )


def test_the_arm_scorer_prefers_what_conserves_and_scores_nan_lowest():
    state, cands = candidates(1)
    cands[0, 2] = state[0].roll(1, -1)
    cands[0, 3, 0, 0, 0] = torch.nan
    scores = ARMScorer()(state, cands)
    assert scores.argmax().item() == 2 and scores[0, 2].abs() < 1e-5
    assert scores[0, 3] == -torch.inf


def test_the_arm_scorer_keeps_its_specs_constants_and_picks_gamma_by_problem():
    state, cands = candidates()
    gamma = torch.tensor([1.2, 1.3, 1.4, 1.5, 1.6])
    spec = StateSpec.euler2d(gamma=gamma, cell_volume=0.25)
    scorer = ARMScorer(spec=spec)
    ids = torch.tensor([4, 0, 2])
    expected = arm(state, cands, spec.replace(gamma=gamma[ids]), momentum="components", scale="relative").score
    torch.testing.assert_close(scorer(state, cands, context=ScoreContext(0, ids)), expected)
    with pytest.raises(ValueError, match="gamma"):
        scorer(state, cands)


def test_the_arm_scorers_defaults_are_relative_and_do_not_let_components_cancel():
    state, cands = candidates()
    cands[:, 0, 1] = state[:, 1] + 0.01
    cands[:, 0, 2] = state[:, 2] - 0.01
    spec = StateSpec.euler2d(cell_volume=0.25)
    terms = ARMScorer(spec=spec).terms(state, cands)
    assert torch.equal(terms.score, arm(state, cands, spec, ARMWeights(), momentum="components", scale="relative").score)
    assert (terms.momentum[:, 0] > 100 * ARMScorer(spec=spec, momentum="sum").terms(state, cands).momentum[:, 0]).all()
    assert torch.equal(ARMScorer(ARMWeights(), 3.0)(state, cands), ARMScorer()(state, cands))  # relative penalties have no units


def test_wrong_arm_arguments():
    with pytest.raises(ValueError, match="cell_volume is -1"):
        ARMScorer(ARMWeights(), -1.0)
    with pytest.raises(ValueError, match=r"boundary_mask is torch.float32"):
        ARMScorer(ARMWeights(), 1.0, torch.ones(8, 8))
    with pytest.raises(ValueError, match="boundary_mask"):
        ARMScorer(ARMWeights(), 1.0, torch.ones(4, 4, dtype=torch.bool))(*candidates())
    with pytest.raises(ValueError, match="momentum is 'each'"):
        ARMScorer(ARMWeights(), 1.0, momentum="each")


def test_the_oracle_is_minus_the_true_error():
    truth = shifted(euler_state(), 4)
    state, cands = candidates()
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ids = torch.tensor([2, 0, 2])
    scores = OracleScorer(truth, scale=scale)(state, cands, context=ScoreContext(1, ids))
    error = (cands - truth[ids, 2].unsqueeze(1)) / scale.reshape(4, 1, 1)
    torch.testing.assert_close(scores, -error.square().mean((2, 3, 4)))
    single = OracleScorer(truth)(state[0].expand_as(cands[0]), cands[0], context=ScoreContext(1, torch.tensor([1])))
    torch.testing.assert_close(single, -(cands[0] - truth[1, 2]).square().mean((1, 2, 3)))


def test_given_channels_are_no_candidates_error():
    spec = StateSpec.fields("u", "mask", "v", given="mask")
    truth, cands = torch.randn(2, 3, 3, 5, 5), torch.randn(2, 4, 3, 5, 5)
    scale, context = torch.tensor([1.0, 7.0, 2.0]), ScoreContext(1, torch.tensor([1, 0]))
    oracle = OracleScorer(truth, scale=scale, spec=spec)
    found, target = oracle.score_group(truth[:, 0], cands, context), truth[[1, 0], 2].unsqueeze(1)
    plain = OracleScorer(truth[:, :, [0, 2]], scale=scale[[0, 2]])
    torch.testing.assert_close(found, plain.score_group(truth[:, 0, [0, 2]], cands[:, :, [0, 2]], context))
    moved = cands + oracle.ascent(truth[:, 0], cands, context)
    torch.testing.assert_close(moved[:, :, [0, 2]], target[:, :, [0, 2]].expand(-1, 4, -1, -1, -1))
    assert torch.equal(moved[:, :, 1], cands[:, :, 1])


def test_the_oracle_says_what_it_needs():
    oracle, (state, cands) = OracleScorer(shifted(euler_state(), 4)), candidates()
    with pytest.raises(ValueError, match="the oracle needs ScoreContext"):
        oracle(state, cands)
    with pytest.raises(ValueError, match="step 4 leads to frame 5 and the truth has frames 0 to 4; roll out at most 4 steps"):
        oracle(state, cands, context=ScoreContext(4, torch.arange(3)))
    with pytest.raises(ValueError, match=r"problem_ids are \[0, 1, 7\] for 3 states"):
        oracle(state, cands, context=ScoreContext(0, torch.tensor([0, 1, 7])))
    with pytest.raises(ValueError, match=r"scale is .* for each of the 4 channels"):
        OracleScorer(shifted(euler_state(), 4), scale=torch.ones(3))


def test_a_list_is_the_weighted_sum_with_its_parts():
    state, cands = candidates()
    a, b = MeanScorer(), ARMScorer(ARMWeights(), 1.0)
    both = ScorerList([a, b, mean_score], [1.0, 2.0, 0.5])
    torch.testing.assert_close(both(state, cands), 1.5 * a(state, cands) + 2 * b(state, cands))
    assert list(both.breakdown(state, cands)) == ["MeanScorer", "ARMScorer", "mean_score"]
    named = ScorerList({"m": a, "n": a}, {"n": 1.0, "m": -1.0})
    assert named(state, cands).abs().max() == 0
    torch.testing.assert_close(named.breakdown(state[0], cands[0])["n"], a(state, cands)[0])
    assert list(ScorerList([a, a]).breakdown(state, cands)) == ["MeanScorer", "MeanScorer_2"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.floats(0.1, 1e4), st.floats(-100, 100))
def test_zscores_ignore_units(values, factor, offset):
    raw = torch.tensor(values, dtype=torch.float64).unsqueeze(0)
    if raw.std() < 1e-3:
        return

    def score(f, o):
        return ScorerList([lambda x, c: f * c.flatten(1).mean(1) + o], zscore=True)

    state, cands = torch.zeros(1, 1, 1, 1, dtype=torch.float64), raw.reshape(1, -1, 1, 1, 1)
    plain = score(1.0, 0.0)(state, cands)
    torch.testing.assert_close(score(factor, offset)(state, cands), plain, rtol=1e-6, atol=1e-6)
    assert plain.mean().abs() < 1e-9 and plain.std(correction=0).item() == pytest.approx(1)


def test_zscores_of_equal_and_of_nonfinite_scores():
    state, cands = torch.zeros(1, 1, 1, 1), torch.tensor([0.1, 0.3, math.nan, 0.2]).reshape(1, 4, 1, 1, 1)
    scores = ScorerList([lambda x, c: c.flatten(1).mean(1)], zscore=True)(state, cands)[0]
    assert scores[2].isnan() and scores[[0, 1, 3]].tolist() == pytest.approx([-(1.5**0.5), 1.5**0.5, 0], abs=1e-5)
    same = ScorerList([lambda x, c: 0.1 + 1e-9 * c.flatten(1).mean(1)], zscore=True)
    assert same(state, torch.rand(1, 5, 1, 1, 1)).abs().max() == 0


def test_wrong_lists():
    with pytest.raises(ValueError, match="scorers is empty"):
        ScorerList([])
    with pytest.raises(ValueError, match="weights has 1 entries for 2 scorers"):
        ScorerList([MeanScorer(), MeanScorer()], [1.0])
    with pytest.raises(ValueError, match="weights are named"):
        ScorerList({"a": MeanScorer()}, {"b": 1.0})
