import itertools

import pytest
import torch
from torch import Tensor

from tests.scorers import last_cell
from tests.surrogates import Foreign, brittle, drop_surrogate, euler_state, shift_surrogate, shifted, vit_surrogate
from ttcfast.rewards.common import ARMScorer, OracleScorer, ScorerList
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget
from ttcfast.ttc.inference import TTCGreedy

ARM = ARMScorer(ARMWeights(), 1.0, scale="relative", momentum="components")


class Walk:
    """An exactly solvable model: one number, which every candidate changes by -1, 0 or 1; the third cell counts the steps."""

    spec = StateSpec(density=0, momentum=(1,), energy=2, ndim=1)

    def deterministic(self, x: Tensor) -> Tensor:
        return x + torch.tensor([0.0, 0, 1]).view(1, 3, 1)

    def candidates(self, x, ids, *, problem_ids, seed, step, stochastic=None):
        moves = (torch.tensor([0.0, 1, -1])[ids % 3]).view(1, -1, 1, 1) * torch.tensor([1.0, 0, 0]).view(3, 1)
        return self.deterministic(x).unsqueeze(1) + moves


def hilly(x_t, cand_tp1, *, context):
    """Rewards that a greedy walk does not find: a valley in front of a peak that moves with the problem."""
    place, problem = cand_tp1[:, :, 0, 0].double(), context.problem_ids.double().unsqueeze(1)
    return torch.sin(2.3 * place + problem) - 0.11 * (place - 3 - problem).square()


def best_walk(problem: int, start: float, steps: int, total) -> float:
    """The largest total over all 3^T paths."""
    found = []
    for moves in itertools.product((0, 1, -1), repeat=steps):
        places = torch.tensor(moves).cumsum(0) + start
        cand = torch.stack([places.double(), places * 0, places * 0], 1).view(steps, 1, 3, 1)
        found.append(total(hilly(None, cand, context=ScoreAt(problem, steps))[:, 0]))
    return max(found)


class ScoreAt:
    def __init__(self, problem: int, steps: int) -> None:
        self.problem_ids = torch.full((steps,), problem)


FADING = 0.9 ** torch.arange(4, -1, -1, dtype=torch.float64)
TOTALS = {
    "sum": lambda s: float(s.sum()),
    "mean": lambda s: float(s.mean()),
    "discounted": lambda s: float((s * FADING).sum()),
}


@pytest.mark.parametrize("aggregation", TOTALS)
def test_a_beam_wide_enough_finds_the_best_of_all_paths(aggregation):
    steps, x0 = 5, torch.zeros(3, 3, 1)
    x0[:, 0, 0] = torch.tensor([0.0, -2.0, 1.5])

    def roll(k):
        # the walk has at most 2 T + 1 places, but only B can be kept after the first step, so that narrow beams come first
        cfg = TTCConfig(branching_factor=243, approach="beam", beam_width=k, score_aggregation=aggregation, ndim=1)
        return TTCBeam(Walk(), hilly, cfg, drop_duplicates=True).rollout(x0, steps, return_info=True)

    wide, narrow = roll(11), roll(1)
    optimum = [best_walk(p, float(x0[p, 0, 0]), steps, TOTALS[aggregation]) for p in range(3)]
    assert wide.beams[-1].paths[:, 0].tolist() == pytest.approx(optimum, rel=1e-12)
    assert (narrow.beams[-1].paths[:, 0] < wide.beams[-1].paths[:, 0] - 0.1).any()  # there was something to find
    # the trajectory is the path whose score was promised
    scores = torch.stack([hilly(None, wide.trajectory[:, t + 1].unsqueeze(1), context=Ids())[:, 0] for t in range(steps)], 1)
    assert [TOTALS[aggregation](s) for s in scores] == pytest.approx(optimum, rel=1e-6)
    assert (wide.trajectory[:, 1:, 0] - wide.trajectory[:, :-1, 0]).abs().max() <= 1
    assert torch.equal(wide.trajectory[:, :, 2, 0], torch.arange(steps + 1.0).expand(3, -1))


class Ids:
    problem_ids = torch.arange(3)


GREEDY_CASES = {
    "plain": ({}, {}),
    "noise": ({"latent_sigma": 0.05, "input_eps": 0.01, "antithetic": True}, {"project": "conservation"}),
    "chunks": ({}, {"chunk_size": 4}),
    "no deterministic": ({}, {"include_deterministic": False, "score_floor": 1.15, "max_resample": 3}),
    "floor": ({}, {"score_floor": 1.3, "chunk_size": 3}),
    "collapsed": ({}, {"min_score_spread": 1e-2}),
    "one": ({}, {"branching_factor": 1}),
    "refined": ({}, {"branching_factor": 3, "refine_steps": 2, "chunk_size": 4}),
}


@pytest.mark.parametrize("case", GREEDY_CASES)
def test_one_beam_is_the_greedy_search_to_the_last_bit(case):
    noise, options = GREEDY_CASES[case]
    options = {"branching_factor": 7, "seed": 5, **options}
    fm, x0 = drop_surrogate(stochastic=noise), euler_state(3)
    scorer = ARM if case == "refined" else last_cell
    greedy = TTCGreedy(fm, scorer, TTCConfig(**options)).rollout(x0, 3, return_info=True)
    for approach, aggregation in (("greedy", "sum"), ("beam", "discounted"), ("diverse_beam", "last")):
        cfg = TTCConfig(**options, approach=approach, score_aggregation=aggregation)
        beam = TTCBeam(fm, scorer, cfg).rollout(x0, 3, return_info=True)
        assert (beam.nfe, beam.reward_evaluations) == (greedy.nfe, greedy.reward_evaluations)
        for name in ("trajectory", "chosen", "fallbacks", "resamples", "nonfinite", "collapsed", "unprojected", "frozen"):
            assert torch.equal(getattr(beam, name), getattr(greedy, name)), name
        chosen = greedy.scores.gather(2, greedy.chosen.clamp_min(0).unsqueeze(2))
        assert torch.equal(beam.scores[~beam.fallbacks], chosen[~greedy.fallbacks])


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("options", [{}, {"max_resample": 0}, {"include_deterministic": False, "score_floor": 0.0}])
def test_one_beam_meets_bad_candidates_as_the_greedy_search_does(options):
    fm = brittle(1.19, 0.03)
    x0, cfg = euler_state(6), {"branching_factor": 3, **options}
    greedy = TTCGreedy(fm, last_cell, TTCConfig(**cfg)).rollout(x0, 8, return_info=True)
    beam = TTCBeam(fm, last_cell, TTCConfig(**cfg, approach="beam")).rollout(x0, 8, return_info=True)
    assert greedy.frozen.any() and not greedy.frozen.all() and greedy.resamples.any() == bool(options.get("max_resample", 1))
    torch.testing.assert_close(beam.trajectory, greedy.trajectory, rtol=0, atol=0, equal_nan=True)
    for name in ("chosen", "fallbacks", "resamples", "nonfinite", "frozen"):
        assert torch.equal(getattr(beam, name), getattr(greedy, name)), name


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("approach", ["beam", "diverse_beam", "particle"])
def test_what_happens_to_a_problem_is_its_own_affair(approach):
    fm = brittle()
    x0, ids = euler_state(6), torch.arange(6)
    cfg = TTCConfig(branching_factor=3, beam_width=3, approach=approach, max_resample=1, temperature=0.1 if approach == "particle" else 1.0)
    together = TTCBeam(fm, last_cell, cfg).rollout(x0, 5, return_info=True)
    assert together.frozen.any() and not together.frozen.all() and together.nonfinite.any()
    live = [int((b.positions >= 0).sum(1).max()) for b in together.beams]
    assert max(live) == 3
    for p in range(6):
        alone = TTCBeam(fm, last_cell, cfg).rollout(x0[p : p + 1], 5, return_info=True, problem_ids=ids[p : p + 1])
        torch.testing.assert_close(alone.trajectory[0], together.trajectory[p], rtol=0, atol=0, equal_nan=True)
        for name in ("scores", "chosen", "fallbacks", "resamples", "nonfinite", "frozen"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[p]), name


@pytest.mark.parametrize(
    "options", [{}, {"approach": "diverse_beam"}, {"approach": "particle", "temperature": 0.01}, {"lookahead": 2, "score_floor": -1.0}]
)
def test_chunks_change_nothing(options):
    fm, x0 = vit_surrogate(), euler_state(2)

    def roll(**chunks):
        cfg = TTCConfig(**{"branching_factor": 7, "beam_width": 4, "approach": "beam", **options, **chunks})
        return TTCBeam(fm, last_cell, cfg, drop_duplicates=cfg.approach != "particle").rollout(x0, 2, return_info=True)

    whole = roll()
    assert len(whole.beams[-1].parents.unique()) > 1 and len(whole.chosen.unique()) > 1
    for size in (5, 24, 1000):
        part = roll(chunk_size=size)
        assert torch.equal(part.chosen, whole.chosen)
        torch.testing.assert_close(part.trajectory, whole.trajectory)
        for ours, theirs in zip(part.beams, whole.beams):
            assert torch.equal(ours.parents, theirs.parents) and torch.equal(ours.positions, theirs.positions)


def test_beams_never_share_noise():
    fm, x0 = drop_surrogate(), euler_state(1)
    seen = []
    inner = fm.candidates
    fm.candidates = lambda x, ids, **k: seen.append((k["step"], ids.flatten().tolist())) or inner(x, ids, **k)
    TTCBeam(fm, last_cell, TTCConfig(branching_factor=5, beam_width=3, approach="beam")).rollout(x0, 3)
    assert [ids for _, ids in seen] == [[1, 2, 3, 4], *[[i * 5 + j for i in range(3) for j in range(1, 5)]] * 2]


def test_lookahead_ranks_by_what_comes_after():
    """The oracle with a lookahead prefers the candidate from which the deterministic steps stay close to the truth."""
    fm, x0 = shift_surrogate(0.05), euler_state(2)
    truth = shifted(x0, 4)
    cfg = TTCConfig(branching_factor=4, beam_width=2, approach="beam", lookahead=2, include_deterministic=False)
    r = TTCBeam(fm, OracleScorer(truth), cfg).rollout(x0, 4, return_info=True)
    first = fm.candidates(x0, torch.arange(4), problem_ids=torch.arange(2), seed=0, step=0)
    error = lambda cand, t: (cand - truth[:, t].unsqueeze(1)).square().flatten(2).mean(2).double()  # noqa: E731
    ahead = sum(error(first.roll(s, -1), 1 + s) for s in range(3))
    assert torch.equal(r.beams[0].positions, ahead.argsort(dim=1)[:, :2])
    torch.testing.assert_close(r.beams[0].scores, -error(first, 1).gather(1, r.beams[0].positions))
    assert r.nfe == 2 * 4 * 3 + 2 * 8 * (3 + 2 + 1)  # fewer steps ahead at the end


def test_diverse_subtrees_do_not_meet_and_particles_follow_their_weights():
    fm, x0 = drop_surrogate(), euler_state(3)
    cfg = {"branching_factor": 5, "beam_width": 4}
    diverse = TTCBeam(fm, last_cell, TTCConfig(**cfg, approach="diverse_beam")).rollout(x0, 4, return_info=True)
    assert all(torch.equal(b.parents, torch.arange(4).expand(3, 4)) for b in diverse.beams[1:])
    cold = TTCBeam(fm, last_cell, TTCConfig(**cfg, approach="particle", temperature=1e-9)).rollout(x0, 2, return_info=True)
    assert all((b.scores == b.scores[:, :1]).all() for b in cold.beams)  # the best of all, four times
    warm = TTCBeam(fm, last_cell, TTCConfig(**cfg, approach="particle", temperature=1e9)).rollout(x0, 2, return_info=True)
    assert all((b.parents.diff(dim=1) == 1).all() for b in warm.beams)  # equal weights: one of each parent's five


def test_states_without_descendants_are_dropped():
    fm, x0 = drop_surrogate(), euler_state(2)
    controller = TTCBeam(fm, last_cell, TTCConfig(branching_factor=6, beam_width=5, approach="beam"))
    ids = torch.arange(2)
    run = controller._begin(x0, ids, 30, None, controller._chunks(x0, ids))
    most = max(run.history.held for _ in controller._steps(run, None))
    assert most < 2 * (30 + 6 * 5) < 2 * 30 * 5
    states = run.best_paths(x0)["states"]
    assert torch.equal(states, controller.rollout(x0, 30)) and states.isfinite().all()


def test_steps_come_one_by_one_and_a_single_problem_has_the_sketchs_shape():
    fm, x0 = drop_surrogate(history=2), euler_state(4).view(2, 2, 4, 8, 8)
    controller = TTCBeam(fm, ARM, TTCConfig(branching_factor=4, beam_width=3, approach="beam", lookahead=1))
    whole = controller.rollout(x0, 4, return_info=True)
    steps = list(controller.rollout_iter(x0, 4))
    assert torch.equal(steps[-1].state, whole.trajectory[:, -1]) and [s.step for s in steps] == [0, 1, 2, 3]
    assert sum(s.nfe for s in steps) == whole.nfe and sum(s.copies for s in steps) == whole.copies
    assert whole.peak_bytes > 1 << 20 and whole.scores.shape == (2, 4, 3)
    alone = controller.rollout(x0[0], 4)
    assert alone.shape == (4, 5, 8, 8)
    torch.testing.assert_close(alone.transpose(0, 1), whole.trajectory[0])
    assert torch.equal(controller.step_from(x0, step=0).positions, steps[0].positions)


def test_a_foreign_model_can_be_searched():
    r = TTCBeam(Foreign(), last_cell, TTCConfig(branching_factor=4, beam_width=2, approach="beam")).rollout(
        euler_state(2), 3, return_info=True
    )
    assert r.trajectory.isfinite().all() and r.nfe == 2 * 4 + 2 * 2 * 8 and r.beams[-1].paths.isfinite().all()


@pytest.mark.parametrize("then", ["deterministic", "end"])
@pytest.mark.parametrize("options", [{}, {"select": "softmax_mean"}, {"include_deterministic": False, "score_floor": 1.2}])
def test_a_greedy_search_has_budgets_too(options, then):
    cfg, x0 = TTCConfig(branching_factor=5, **options), euler_state(2)
    free = TTCGreedy(drop_surrogate(), last_cell, cfg).rollout(x0, 6, return_info=True)
    r = TTCGreedy(drop_surrogate(), last_cell, cfg).rollout(x0, 6, return_info=True, budget=Budget(40, then=then))
    assert 0 < r.searched < 6 == free.searched and r.evaluations <= 40 and r.scores.shape == (2, r.chosen.shape[1], 5)
    assert r.chosen.shape[1] == (r.searched if then == "end" else 6)
    if "score_floor" not in options:  # where nothing is drawn again the budget changes nothing before its end
        assert torch.equal(r.trajectory[:, : r.searched + 1], free.trajectory[:, : r.searched + 1])
        assert torch.equal(r.chosen[:, : r.searched], free.chosen[:, : r.searched])
    if not options:
        beam = TTCBeam(drop_surrogate(), last_cell, cfg).rollout(x0, 6, return_info=True, budget=Budget(40, then=then))
        assert torch.equal(beam.trajectory, r.trajectory) and torch.equal(beam.chosen, r.chosen) and beam.nfe == r.nfe
    steps = list(TTCGreedy(drop_surrogate(), last_cell, cfg).rollout_iter(x0, 6, budget=Budget(40, then=then)))
    assert torch.equal(steps[-1].state, r.trajectory[:, -1]) and sum(s.searched for s in steps) == r.searched
    with pytest.raises(
        ValueError, match=r"evaluations is 3 and the (first step takes 1\d|deterministic rollout .* takes 12); give at least that"
    ):
        TTCGreedy(drop_surrogate(), last_cell, cfg).rollout(x0, 6, budget=Budget(3, then=then))


def test_evaluations_stay_within_the_budget_and_the_rest_is_deterministic():
    fm, x0 = drop_surrogate(), euler_state(2)
    controller = TTCBeam(fm, last_cell, TTCConfig(branching_factor=5, beam_width=3, approach="beam"))
    free = controller.rollout(x0, 6, return_info=True)
    for evaluations in (12, 48, 10**6):
        r = controller.rollout(x0, 6, return_info=True, budget=Budget(evaluations))
        assert r.nfe <= evaluations and r.trajectory.shape == free.trajectory.shape
        assert r.searched == {12: 0, 48: 2, 10**6: 6}[evaluations]
        if r.searched < 6:
            x = r.trajectory[:, r.searched]
            for t in range(r.searched, 6):
                x = fm.deterministic(x)
                assert torch.equal(x, r.trajectory[:, t + 1])
    assert torch.equal(r.trajectory, free.trajectory)
    ended = controller.rollout(x0, 6, return_info=True, budget=Budget(47, then="end"))
    assert ended.trajectory.shape[1] == 3 and ended.nfe == 40 and ended.chosen.shape == (2, 2)
    late = controller.rollout(x0, 6, return_info=True, budget=Budget(seconds=1e-9))
    assert late.searched == 1 and late.trajectory.isfinite().all()
    with pytest.raises(ValueError, match=r"evaluations is 11 .* takes 12; give at least that, or then='end'"):
        controller.rollout(x0, 6, budget=Budget(11))


@pytest.mark.parametrize("then", ["deterministic", "end"])
@pytest.mark.parametrize("include", [True, False])
def test_fallbacks_and_groups_drawn_again_stay_within_the_budget(include, then):
    """No candidate reaches the floor, so that every step is drawn again and falls back, which costs where candidate 0 is none."""
    cfg = TTCConfig(branching_factor=5, beam_width=3, approach="beam", include_deterministic=include, score_floor=1e3, max_resample=1)
    controller, searched = TTCBeam(drop_surrogate(), last_cell, cfg), set()
    for evaluations in range(13, 66, 3):
        r = controller.rollout(euler_state(2), 6, return_info=True, budget=Budget(evaluations, then=then))
        assert r.nfe <= evaluations and r.fallbacks.sum() == 2 * r.searched
        searched.add(r.searched)
    assert len(searched) > 2


def test_a_tie_breaker_decides_between_candidates_of_equal_score():
    fm, x0 = drop_surrogate(), euler_state(2)
    cfg = TTCConfig(branching_factor=9, beam_width=3, approach="beam", include_deterministic=False)
    drawn = fm.candidates(x0, torch.arange(9), problem_ids=torch.arange(2), seed=0, step=0)[:, :, 0, -1, -1]
    middle = drawn.median(1).values

    def half(x_t, cand_tp1, *, context):  # the five above the middle are tied at 1, the others at 0
        return (cand_tp1[:, :, 0, -1, -1] >= middle[context.problem_ids].unsqueeze(1)).double()

    def positions(**options):
        return TTCBeam(fm, half, cfg, **options).step_from(x0, step=0).positions

    tied = (drawn >= middle.unsqueeze(1)).double()
    first = tied.argsort(dim=1, descending=True, stable=True)[:, :3]
    assert torch.equal(positions(), first)
    lowest = (tied - 0.1 * drawn).argsort(dim=1, descending=True)[:, :3]  # of the five, those nearest to the middle
    assert not torch.equal(lowest, first) and torch.equal(positions(tie_breaker=lambda x_t, c: -last_cell(x_t, c)), lowest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tie_breaker": last_cell},
            r"tie_breaker is a function and approach 'particle' draws .* use tie_breaker=None, or approach='beam'",
        ),
        ({"drop_duplicates": True}, r"drop_duplicates is True and approach 'particle' draws .* use drop_duplicates=False, or"),
    ],
)
def test_particles_refuse_what_ranks_candidates(options, message):
    with pytest.raises(ValueError, match=message):
        TTCBeam(drop_surrogate(), last_cell, TTCConfig(approach="particle", beam_width=2), **options)


REFINED = {
    "beam": {"beam_width": 3},
    "diverse_beam": {"beam_width": 3},
    "particle": {"beam_width": 4, "temperature": 0.3},
}


@pytest.mark.parametrize("lengths", [(1.0,), (0.25, 1.0)])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("approach", REFINED)
def test_chunks_change_nothing_of_a_refined_search(approach, steps, lengths):
    """Copies stand behind all candidates of their beam, whichever chunk made them; particles' are made once more when they are drawn."""
    fm, x0 = vit_surrogate(), euler_state(2)

    def roll(**chunks):
        refinement = {"refine_steps": steps, "refine_lengths": lengths, "trust": None}
        cfg = TTCConfig(branching_factor=4, approach=approach, **REFINED[approach], **refinement, **chunks)
        return TTCBeam(fm, ARM, cfg).rollout(x0, 2, return_info=True)

    whole = roll()
    assert whole.beams[-1].positions.max() < 4 * (1 + steps * len(lengths))
    positions = torch.cat([beams.positions for beams in whole.beams])
    assert (positions >= 4).any() and (whole.chosen >= 4).any()  # refined members win
    assert len(positions[positions >= 4].unique()) > 1
    for size in (2, 5, 16):
        part = roll(chunk_size=size)
        assert torch.equal(part.chosen, whole.chosen) and part.reward_evaluations == whole.reward_evaluations
        torch.testing.assert_close(part.trajectory, whole.trajectory)
        for ours, theirs in zip(part.beams, whole.beams):
            assert torch.equal(ours.parents, theirs.parents) and torch.equal(ours.positions, theirs.positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0; it must be at least 1"),
        ({"beam_width": 6, "approach": "beam"}, "beam_width is 6 and the first step, which leaves a single state, has branching_factor=5"),
        ({"beam_width": 6, "approach": "diverse_beam"}, "beam_width is 6 and the first step"),
        ({"beam_width": 2}, "beam_width is 2 and approach 'greedy', which keeps one beam; use approach='beam'"),
        ({"select": "softmax_mean", "approach": "beam"}, "select is 'softmax_mean', a combination of candidates"),
        ({"temperature": 2.0, "approach": "beam"}, "temperature is 2.0 and approach 'beam' does not sample"),
        ({"temperature": 0.0, "approach": "particle"}, "temperature is 0.0; it must be positive"),
        ({"discount": 1.5}, "discount is 1.5; it lies between 0"),
        ({"memory_budget": 100, "approach": "beam"}, "memory_budget is 100 bytes and generating and scoring one candidate takes"),
    ],
)
def test_what_a_beam_cannot_do_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        TTCBeam(drop_surrogate(), last_cell, TTCConfig(**options)).rollout(euler_state(1), 1)


def test_scores_of_another_shape_or_all_nan_and_groups_ahead():
    cfg = TTCConfig(branching_factor=4, beam_width=2, approach="beam")
    with pytest.raises(ValueError, match=r"scorer .* returned shape \(2,\); expected one score per candidate"):
        TTCBeam(drop_surrogate(), lambda x_t, c: c[:2, 0, 0, 0], cfg).rollout(euler_state(2), 1)
    with pytest.warns(RuntimeWarning, match=r"step 0: scorer <lambda> returned no finite score for problems \[0, 1\]"):
        r = TTCBeam(drop_surrogate(), lambda x_t, c: c[:, 0, 0, 0] * torch.nan, cfg).rollout(euler_state(2), 3, return_info=True)
    assert r.fallbacks.all() and torch.equal(r.resamples, torch.full((2, 3), 2))
    deterministic = TTCGreedy(drop_surrogate(), ARM, TTCConfig(branching_factor=1)).rollout(euler_state(2), 3)
    torch.testing.assert_close(r.trajectory, deterministic)
    group = ScorerList([ARM], zscore=True)
    assert TTCBeam(drop_surrogate(), group, cfg).rollout(euler_state(1), 2).isfinite().all()
    with pytest.raises(ValueError, match="lookahead is 1 and ScorerList compares the candidates of a step"):
        TTCBeam(drop_surrogate(), group, TTCConfig(lookahead=1))
