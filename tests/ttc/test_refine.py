import pytest
import torch

from tests.scorers import Towards, arm
from tests.surrogates import drop_surrogate, euler_state, shift_surrogate, shifted
from ttcfast.rewards.common import ARMScorer, OracleScorer, ScoreContext, Scorer, ScorerList
from ttcfast.rewards.prm.dense import DensePRM
from ttcfast.rewards.prm.model import PRM
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.refine import refine, refine_and_score

SPEC = StateSpec.euler2d()
ONLY = dict.fromkeys(("w_mass", "w_momentum", "w_energy", "w_bc", "w_positivity"), 0.0)


@pytest.mark.parametrize("term", ["w_mass", "w_energy", "w_bc", "w_positivity"])
def test_a_full_step_along_one_penalty_removes_it(term):
    state, spec = euler_state(3), SPEC
    candidates = state.unsqueeze(1) + 0.1 * torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.02
    if term == "w_bc":
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[:, 0] = True
        spec = SPEC.replace(boundary_mask=mask, boundary_value=0.5, periodic=False)
    if term == "w_positivity":
        candidates[:, :, 0, 2, 2] = -0.05
    scorer = arm(spec, **{**ONLY, term: 1.0})
    move = scorer.ascent(state, candidates, None)
    before, after = (scorer.score_group(state, c, None) for c in (candidates, candidates + move))
    assert (before < -1e-4).all()
    # conservation is linear in the candidate, so that one step takes all; mean absolute differences and clipped values are so up to kinks
    assert (after > (1e-3 if term in ("w_mass", "w_energy") else 0.8) * before).all()


def test_half_a_step_closes_half_the_gap_of_a_linear_penalty():
    state = euler_state(2)
    candidates = state.unsqueeze(1) + torch.tensor([0.03, -0.02]).reshape(1, 2, 1, 1, 1)
    scorer = arm(**{**ONLY, "w_mass": 1.0})
    gap = scorer.score_group(state, candidates + 0.5 * scorer.ascent(state, candidates, None), None)
    torch.testing.assert_close(gap, 0.5 * scorer.score_group(state, candidates, None), rtol=1e-4, atol=0)


def test_what_cannot_be_scored_is_not_moved():
    state = euler_state(2)
    candidates = state.unsqueeze(1).repeat(1, 3, 1, 1, 1) + 0.01
    candidates[0, 1, 2, 3, 3] = torch.nan
    move = arm().ascent(state, candidates, None)
    assert move.isfinite().all() and (move[0, 1] == 0).all() and (move[0, 0] != 0).any()


def test_every_length_is_a_block_and_the_best_copy_goes_on():
    state, b = euler_state(2), 3
    candidates = state.unsqueeze(1) + 0.1 * torch.randn(2, b, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    truth = shifted(state, 1)
    oracle = OracleScorer(truth)  # a full step is the way to the truth
    context = ScoreContext(0, torch.arange(2))
    group = refine(state, candidates, oracle, context, steps=2, lengths=(0.25, 0.5, 1.6))
    assert group.shape == (2, 7 * b, 4, 8, 8)
    blocks = group.split(b, 1)
    assert torch.equal(blocks[0], candidates)
    away = candidates - truth[:, 1:]
    # of 0.75, 0.5 and -0.6 times the error the half goes on
    for block, left in zip(blocks[1:], (0.75, 0.5, -0.6, 0.375, 0.25, -0.3)):
        torch.testing.assert_close(block - truth[:, 1:], left * away, atol=2e-6, rtol=0)
    assert torch.equal(refine(state, candidates, oracle, context, steps=0, lengths=(1.0,)), candidates)


class Noted(PRMScorer):
    """Counts the candidates that its network looks at."""

    seen_by_network = 0

    def _chunks(self, state, candidates):
        self.seen_by_network += candidates.shape[0] * candidates.shape[1]
        return super()._chunks(state, candidates)


@pytest.mark.parametrize("lengths", [(1.0,), (0.5, 1.0)])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("kind", ["dense", "scalar", "list", "zscore", "arm"])
def test_nothing_is_scored_twice_and_all_scores_are_those_of_the_group(kind, steps, lengths):
    torch.manual_seed(0)
    network = PRM(8, width=8, depth=2) if kind == "scalar" else DensePRM(8, width=4, levels=2, spec=SPEC)
    torch.nn.init.normal_(network.out.weight if kind != "scalar" else network.head[-1].weight, std=0.05)
    prm, state, context = Noted(network), euler_state(2), ScoreContext(0, torch.arange(2))
    both = ScorerList({"prm": prm, "arm": arm()}, zscore=kind == "zscore")
    scorer = {"list": both, "zscore": both, "arm": arm()}.get(kind, prm)
    candidates = state.unsqueeze(1) + 0.05 * torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    candidates[0, 1, 0, 0, 0] = torch.nan
    cfg = TTCConfig(refine_steps=steps, refine_lengths=lengths, trust=2.0)
    refined = refine_and_score(state, candidates, scorer, context, cfg, SPEC)
    looked = prm.seen_by_network
    group = refine(state, candidates, scorer, context, steps=steps, lengths=lengths, trust=2.0, spec=SPEC)
    torch.testing.assert_close(refined.candidates, group, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(refined.scores, scorer.score_group(state, group, context), rtol=1e-5, atol=1e-6)
    if kind in ("dense", "scalar"):
        assert refined.evaluations == 1 + steps * len(lengths) + (steps - 1) * (len(lengths) > 1) * (steps > 0)
        assert looked == 6 * refined.evaluations


def test_no_copy_leaves_the_trust_region():
    state = euler_state(3)
    candidates = state.unsqueeze(1) + 0.02 * torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    far = Towards(state + 100.0)
    spread = state.flatten(2).std(2, correction=0).reshape(3, 1, 4, 1, 1)

    def size(change):
        return (change / spread).square().flatten(2).sum(2).sqrt()

    _, *copies = refine(state, candidates, far, None, steps=2, lengths=(0.5, 1.0), trust=0.3).split(2, 1)
    step = size(candidates - state.unsqueeze(1))
    for copy in copies:
        torch.testing.assert_close(size(copy - candidates), 0.3 * step, rtol=1e-4, atol=0)


def test_a_copy_that_loses_its_positive_density_is_rejected():
    state = euler_state(2)
    target = state.clone()
    target[0, 0, 4, 4] = -1.0
    group = refine(state, state.unsqueeze(1) + 0.01, Towards(target), None, steps=1, lengths=(0.1, 2.0), spec=SPEC)
    assert group[:, :2].isfinite().all() and group[0, 2].isnan().all() and group[1, 2].isfinite().all()
    # one that was not positive before may be mended, or not
    was = target.unsqueeze(1)
    assert refine(state, was, Towards(state), None, steps=1, lengths=(0.1,), spec=SPEC).isfinite().all()


def test_scorers_of_a_list_are_climbed_in_turn():
    state = euler_state(2)
    candidates = state.unsqueeze(1) + 0.01
    oracle, context = OracleScorer(shifted(state, 1)), ScoreContext(0, torch.arange(2))
    twice = ScorerList({"a": oracle, "b": oracle}, {"a": 1.0, "b": 0.5}, zscore=True)
    torch.testing.assert_close(twice.ascent(state, candidates, context), oracle.ascent(state, candidates, context))
    halves = ScorerList({"a": oracle, "unused": lambda x, c: c}, {"a": 2.0, "unused": 0.0})
    torch.testing.assert_close(halves.ascent(state, candidates, context), oracle.ascent(state, candidates, context))


@pytest.mark.parametrize("chunk", [None, 3])
def test_refined_rollout_beats_the_group_it_started_from(chunk):
    fm, x0, truth = drop_surrogate(), euler_state(), shifted(euler_state(), 3)
    plain, refined = (
        TTCGreedy(fm, OracleScorer(truth), TTCConfig(branching_factor=4, chunk_size=chunk, refine_steps=s, trust=None)).rollout(
            x0, 3, return_info=True
        )
        for s in (0, 1)
    )
    assert refined.scores.shape == (3, 3, 12) and plain.scores.shape == (3, 3, 4)
    assert torch.equal(refined.scores[:, 0, :4], plain.scores[:, 0])
    assert (refined.chosen >= 8).all()  # a full step, which the oracle takes to the truth
    torch.testing.assert_close(refined.trajectory, truth, atol=2e-6, rtol=0)
    assert refined.nfe == plain.nfe == 36
    assert plain.reward_evaluations == 36 and refined.reward_evaluations == 36 * (3 + 1)


def test_refined_group_does_not_depend_on_chunks():
    x0 = euler_state()
    results = [
        TTCGreedy(
            drop_surrogate(),
            ARMScorer(scale="absolute"),
            TTCConfig(branching_factor=5, chunk_size=c, refine_steps=2, refine_lengths=(0.5, 1.0)),
        ).rollout(x0, 2, return_info=True)
        for c in (None, 2)
    ]
    torch.testing.assert_close(results[0].scores[:, 0], results[1].scores[:, 0], rtol=1e-3, atol=1e-5)
    for r in results:  # the best of all copies, and of equals the first
        best = r.scores.amax(2)
        assert torch.equal(r.chosen, (r.scores == best.unsqueeze(2)).int().argmax(2))
        assert (best >= r.scores[:, :, :5].amax(2)).all() and (best > r.scores[:, :, :5].amax(2)).any()


def test_arm_sees_raw_candidates_and_a_learned_reward_projected_ones():
    x0 = euler_state()
    cfg = TTCConfig(branching_factor=3, refine_steps=1, project="conservation", trust=None)
    for projected in (False, True):
        scorer = Towards(x0.roll(1, -1), scores_projected=projected)
        TTCGreedy(drop_surrogate(), scorer, cfg).rollout(x0, 1)
        assert (max(scorer.residuals) < 1e-6) == projected
    both = ScorerList({"raw": Towards(x0.roll(1, -1)), "projected": Towards(x0.roll(1, -1), scores_projected=True)}, zscore=True)
    TTCGreedy(drop_surrogate(), both, cfg).rollout(x0, 1)
    raw, seen = (list(both.scorers[name].residuals) for name in ("raw", "projected"))
    assert max(raw) > 1e-4 and max(seen) < 1e-6


def test_rewards_that_cannot_be_climbed_say_so():
    x0, cfg = euler_state(), TTCConfig(branching_factor=2, refine_steps=1)

    def mean_density(x_t, cand_tp1):
        return cand_tp1[:, 0].mean((1, 2))

    with pytest.raises(ValueError, match=r"does not say how large its score can get.*set its maximum"):
        TTCGreedy(shift_surrogate(), mean_density, cfg).rollout(x0, 1)

    def counts(x_t, cand_tp1):
        return -(cand_tp1.detach() > 1).float().mean((1, 2, 3))

    counts.maximum = 0.0
    with pytest.raises(ValueError, match=r"not differentiable in the candidates.*refine_steps=0"):
        TTCGreedy(shift_surrogate(), counts, cfg).rollout(x0, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"refine_steps": -1}, "refine_steps is -1"),
        ({"refine_steps": 1.5}, "refine_steps is 1.5; give a whole number"),
        ({"refine_lengths": ()}, r"refine_lengths is \(\); give one or more"),
        ({"refine_lengths": (0.5, float("nan"))}, "refine_lengths is .*above 0"),
        ({"trust": 0.0}, "trust is 0.0; it must be above 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TTCConfig(**options)


def test_given_channels_stay_as_they_are():
    class Everywhere(Scorer):
        maximum = 0.0

        def score_group(self, state, candidates, context):
            return -candidates.square().flatten(2).mean(2)

        def ascent(self, state, candidates, context):
            return -candidates

    spec = StateSpec.fields("mask", "u", given="mask")
    state, candidates = torch.rand(2, 2, 4, 4), torch.rand(2, 3, 2, 4, 4)
    group = refine(state, candidates, Everywhere(), ScoreContext(0, torch.arange(2)), steps=2, lengths=(0.5,), spec=spec)
    blocks = group.split(3, 1)
    for k, block in enumerate(blocks):
        assert torch.equal(block[:, :, 0], candidates[:, :, 0])
        torch.testing.assert_close(block[:, :, 1], candidates[:, :, 1] * 0.5**k)
