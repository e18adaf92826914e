import dataclasses

import pytest
import torch

from tests.scorers import Towards
from tests.surrogates import drop_surrogate, euler_state, shifted
from ttcfast.evaluation.methods import roll_method
from ttcfast.evaluation.regret import choice_regret
from ttcfast.metrics import conservation_drift
from ttcfast.rewards.common import ARMScorer, OracleScorer, Scorer, ScorerList
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.inference import TTCGreedy


def group(x0, b, **options):
    """The candidates [N, B, C, *S] of the first step."""
    fm = drop_surrogate(**options)
    return torch.cat([fm.deterministic(x0).unsqueeze(1), fm.candidates(x0, torch.arange(1, b), seed=0, step=0)], 1)


def roll(scorer, steps=1, n=3, **options):
    return TTCGreedy(drop_surrogate(), scorer, TTCConfig(**options)).rollout(euler_state(n), steps, return_info=True)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("temperature", [1.0, 1e-4])
def test_softmax_mean_is_the_mean_weighted_by_the_scores(chunk, temperature):
    x0, cold = euler_state(), Towards(euler_state().roll(1, -1))
    r = roll(cold, branching_factor=5, select="softmax_mean", temperature=temperature, chunk_size=chunk)
    candidates = group(x0, 5)
    weights = (cold.score_group(x0, candidates, None).double() / temperature).softmax(1)
    torch.testing.assert_close(r.trajectory[:, 1], torch.einsum("nb,nbcxy->ncxy", weights.float(), candidates), atol=1e-6, rtol=0)
    torch.testing.assert_close(r.weights[:, 0], weights, rtol=1e-3, atol=1e-6)
    assert bool((r.chosen == -1).all()) and r.scores.shape == (3, 1, 5)


def test_a_cold_softmax_chooses_and_candidates_that_failed_have_no_weight():
    x0 = euler_state()

    class Fussy(Towards):
        def score_group(self, state, candidates, context):
            scores = super().score_group(state, candidates, context)
            return torch.where((candidates == spoiled[context.problem_ids].unsqueeze(1)).flatten(2).all(2), torch.nan, scores)

    spoiled = group(x0, 5)[:, 2]
    r = roll(Fussy(x0.roll(1, -1)), branching_factor=5, select="softmax_mean", temperature=1e-12)
    best = roll(Fussy(x0.roll(1, -1)), branching_factor=5)
    torch.testing.assert_close(r.trajectory, best.trajectory, atol=1e-6, rtol=0)
    torch.testing.assert_close(r.weights[:, 0].argmax(1), best.chosen[:, 0])
    assert bool((roll(Fussy(x0), branching_factor=5, select="softmax_mean").weights[:, :, 2] == 0).all()) and best.weights is None


def test_span_of_the_oracle_is_least_squares_on_the_truth():
    x0, scale = euler_state(), torch.tensor([0.5, 1.0, 2.0, 4.0])
    truth = shifted(x0, 1)
    r = roll(OracleScorer(truth, scale=scale), branching_factor=6, select="span", trust=None)
    candidates = group(x0, 6).double()
    units = scale.reshape(4, 1, 1)
    for i in range(3):
        base = candidates[i, 0]
        deviations = ((candidates[i, 1:] - base) / units).flatten(1).T
        wanted = ((truth[i, 1] - base) / units).flatten()
        w = torch.linalg.lstsq(deviations, wanted.unsqueeze(1)).solution[:, 0]
        best = base + (w.reshape(-1, 1, 1, 1) * (candidates[i, 1:] - base)).sum(0)
        torch.testing.assert_close(r.trajectory[i, 1].double(), best, atol=1e-4, rtol=0)
        torch.testing.assert_close(r.weights[i, 0, 1:], w, rtol=0.02, atol=0.02)
    torch.testing.assert_close(r.weights.sum(2), torch.ones(3, 1, dtype=torch.float64))
    assert bool((r.chosen == -1).all())


def test_span_of_the_oracle_with_projection_is_a_ceiling_of_what_is_taken():
    truth = shifted(euler_state(), 1)
    options = {"branching_factor": 6, "project": "conservation"}
    span = roll(OracleScorer(truth), select="span", trust=None, **options)
    one = roll(OracleScorer(truth), **options)

    def error(r):
        return (r.trajectory[:, 1] - truth[:, 1]).square().mean((1, 2, 3))

    assert bool((error(span) < error(one)).all())
    assert max(float(d.max()) for d in conservation_drift(span.trajectory, StateSpec.euler2d()).values()) < 1e-6


@pytest.mark.parametrize("chunk", [None, 2])
def test_span_of_another_reward_climbs_and_is_never_worse_than_the_best_candidate(chunk):
    for scorer in (Towards(euler_state().roll(1, -1)), ARMScorer(scale="absolute")):
        chosen = roll(scorer, branching_factor=5, chunk_size=chunk)
        r = roll(scorer, branching_factor=5, chunk_size=chunk, select="span", trust=None)
        reached = scorer.score_group(euler_state(), r.trajectory[:, 1:2], None)[:, 0].double()
        best = chosen.scores[:, 0].amax(1)
        taken = r.chosen[:, 0] == -1
        assert bool((reached >= best - 1e-6).all()) and bool(taken.any()) and bool((reached > best)[taken].all())
        assert r.nfe == chosen.nfe and r.reward_evaluations == chosen.reward_evaluations + 3 * 4 * (1 + 2)
    # a combination that is no better leaves the candidate alone
    exact = Towards(group(euler_state(), 5)[:, 3])
    r = roll(exact, branching_factor=5, select="span")
    assert r.chosen[:, 0].tolist() == [3, 3, 3] and torch.equal(r.weights[:, 0], torch.eye(5, dtype=torch.float64)[[3, 3, 3]])


def test_span_stays_in_the_trust_region():
    x0, truth = euler_state(), shifted(euler_state(), 1)
    base = drop_surrogate().deterministic(x0)
    free, held = (roll(OracleScorer(truth), branching_factor=6, select="span", trust=t) for t in (None, 3.0))
    step = (base - x0).flatten(1).norm(dim=1)
    moved = [(r.trajectory[:, 1] - base).flatten(1).norm(dim=1) for r in (free, held)]
    assert bool((held.chosen == -1).all()) and bool((moved[0] > 3.0 * step).all())
    torch.testing.assert_close(moved[1], 3.0 * step, rtol=1e-3, atol=0)


class Level(Scorer):
    """Density alone, with a maximum."""

    maximum, marks_nonfinite = 0.0, True

    def score_group(self, state, candidates, context):
        return -(candidates[:, :, 0] - 1.0).square().mean((2, 3))


def test_groups_that_failed_are_drawn_again_and_combined():
    first = group(euler_state(), 4)[1]

    class OftenFails(Level):
        def score_group(self, state, candidates, context):
            bad = (candidates.unsqueeze(2) == first).flatten(3).all(3).any(2)
            return torch.where(bad, -torch.inf, super().score_group(state, candidates, context))

    for select in ("softmax_mean", "span"):
        r = roll(OftenFails(), branching_factor=4, select=select, max_resample=1)
        assert r.resamples[:, 0].tolist() == [0, 1, 0] and not r.fallbacks.any() and r.trajectory.isfinite().all()
        again = drop_surrogate().candidates(euler_state(), torch.arange(5, 8), seed=0, step=0)[1]
        weights = r.weights[1, 0].to(again.dtype)
        assert weights[0] == 0
        mixed = torch.einsum("b,bcxy->cxy", weights[1:], again)
        torch.testing.assert_close(r.trajectory[1, 1], mixed, atol=1e-5, rtol=0)


def test_scores_that_do_not_differ_leave_the_deterministic_step():
    class Flat(Level):
        def score_group(self, state, candidates, context):
            return super().score_group(state, candidates, context) * 0.0 - 1.0

    for select in ("softmax_mean", "span"):
        r = roll(Flat(), steps=2, branching_factor=4, select=select)
        assert bool(r.collapsed.all()) and bool((r.chosen == 0).all())
        assert torch.equal(r.trajectory[:, 1], drop_surrogate().deterministic(euler_state()))
        assert torch.equal(r.weights[..., 0], torch.ones(3, 2, dtype=torch.float64))


def test_combinations_that_make_no_sense_are_refused():
    both = ScorerList([Level(), Level()], zscore=True)
    with pytest.raises(ValueError, match=r"select is 'span' and ScorerList scores candidates against each other .* use zscore=False"):
        TTCGreedy(drop_surrogate(), both, TTCConfig(select="span"))
    with pytest.raises(ValueError, match=r"temperature is 0.5, sampling by score"):
        TTCGreedy(drop_surrogate(), Level(), TTCConfig(select="span", temperature=0.5))
    with pytest.raises(ValueError, match="choices can be compared with select='argmax' only"):
        choice_regret(drop_surrogate(), drop_surrogate(), Level(), shifted(euler_state(), 1), TTCConfig(select="span"))


def test_the_span_oracle_is_a_ceiling_for_all_combinations_of_a_step():
    truth, cfg = shifted(euler_state(), 1), TTCConfig(branching_factor=6)
    for project in (None, "conservation"):
        config = dataclasses.replace(cfg, project=project, refine_steps=2, select="softmax_mean", temperature=0.1)
        error = {
            name: (roll_method(name, drop_surrogate(), truth, 1, None, config).trajectory[:, 1] - truth[:, 1]).square().mean((1, 2, 3))
            for name in ("deterministic", "mean", "oracle", "span_oracle")
        }
        assert all(bool((error["span_oracle"] < error[name]).all()) for name in ("deterministic", "mean", "oracle"))
        assert bool((error["oracle"] <= error["deterministic"]).all())
