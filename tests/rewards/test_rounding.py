import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from tests.surrogates import euler_state, shift_surrogate
from ttcfast import StateSpec, TTCBeam, TTCConfig, TTCGreedy
from ttcfast.core.base_fm import Surrogate
from ttcfast.data import open_trajectories
from ttcfast.evaluation.calibration import candidate_scores
from ttcfast.evaluation.evaluate import Problems
from ttcfast.models import load_surrogate
from ttcfast.physics.equation_of_state import to_primitive
from ttcfast.rewards.common import ARMScorer, ScoreContext, Scorer, ScorerList, as_scorer
from ttcfast.spec import ARMWeights, StochasticConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
ALONG = StochasticConfig(dropout=False, directions=str(EXAMPLES / "directions.safetensors"), directions_strength=0.0)
SPECS = {
    "conserved": StateSpec.euler2d(cell_volume=1 / 64),
    "volumes": StateSpec.euler2d(cell_volume=torch.linspace(0.01, 0.02, 64, dtype=torch.float64).reshape(8, 8)),
    "primitive": StateSpec.pdegym(cell_volume=1 / 64, gamma=torch.tensor([1.4, 1.6, 1.2])),
    "boundary": StateSpec.euler2d(cell_volume=1 / 64, boundary_mask=torch.eye(8, dtype=torch.bool), boundary_value=0.5),
}


def ulp_away(x: torch.Tensor) -> torch.Tensor:
    """One unit in the last place further from 0."""
    if x.dtype == torch.bfloat16:
        return (x.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.nextafter(x, torch.full_like(x, torch.inf).copysign(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout, scale", list(itertools.product(SPECS, ["absolute", "relative"])))
def test_one_ulp_in_every_cell_moves_a_score_by_no_more_than_the_floor(layout, scale, dtype):
    spec = SPECS[layout]
    state = euler_state(dtype=torch.float64)
    state = (to_primitive(state) if layout == "primitive" else state).to(dtype)
    candidates = (state.double().unsqueeze(1) * torch.tensor([1.01, 1.03, 1.05]).reshape(1, 3, 1, 1, 1).double()).to(dtype)
    weights = ARMWeights(1.0, 0.7, 0.5, 0.1, 0.0)
    shares = []
    for momentum in ("sum", "components", "norm"):
        scorer = ARMScorer(weights, None, spec=spec, momentum=momentum, scale=scale)
        floor = scorer.spread_floor(state, ScoreContext(0, torch.arange(3)))
        assert floor.shape == (3,) and floor.dtype == torch.float64
        worst = scorer(state.double(), candidates.double()) - scorer(state.double(), ulp_away(candidates).double())
        shares.append((worst.abs().amax(1) / (1.06 * floor)).max())  # the candidates are up to 5 % larger than the state
        random = torch.where(torch.rand(candidates.shape) < 0.5, ulp_away(candidates), candidates)
        change = scorer(state.double(), random.double()) - scorer(state.double(), candidates.double())
        assert (change.abs().amax(1) < floor).all()
    assert max(shares) <= 1
    assert max(shares) > 0.15  # and it is no more than a few times what can happen


def shipped(problems=2):
    fm = load_surrogate(EXAMPLES / "surrogate.safetensors")
    data = open_trajectories(EXAMPLES).subset(range(problems))
    return fm, data, ARMScorer(ARMWeights(), None, spec=data.spec, momentum="components", scale="relative")


def test_arm_says_nothing_along_the_shipped_directions_and_something_where_totals_differ():
    fm, data, arm = shipped()
    x0 = data.stack()[:, 0]
    still = [x0]
    for _ in range(2):
        still.append(fm.deterministic(still[-1]))
    along = TTCGreedy(fm, arm, TTCConfig(branching_factor=4, stochastic=ALONG)).rollout(x0, T=2, return_info=True)
    assert along.collapsed.all() and not along.chosen.any() and not along.fallbacks.any()
    assert torch.equal(along.trajectory, torch.stack(still, 1))
    assert (along.scores.amax(2) > along.scores.amin(2)).all()  # they differ, by rounding
    for noise in ({"dropout": True}, {"dropout": False, "input_eps": 0.05}):
        free = TTCGreedy(fm, arm, TTCConfig(branching_factor=4, stochastic=noise)).rollout(x0, T=1, return_info=True)
        assert not free.collapsed.any()
        assert torch.equal(free.chosen, free.scores.argmax(2))


def test_with_another_reward_arm_leaves_the_choice_to_it():
    fm, data, arm = shipped()

    def other(x, c, *, context=None):
        return (c - x.unsqueeze(1)).flatten(2).square().mean(2)

    cfg, x0 = TTCConfig(branching_factor=4, stochastic=ALONG), data.stack()[:, 0]
    both = ScorerList({"arm": arm, "other": other}, zscore=True)
    alone = TTCGreedy(fm, ScorerList({"other": other}, zscore=True), cfg).step_from(x0, step=0)
    mixed = TTCGreedy(fm, both, cfg).step_from(x0, step=0)
    assert torch.equal(mixed.chosen, alone.chosen) and torch.equal(mixed.scores, alone.scores)
    assert bool((mixed.chosen > 0).any())
    only = TTCGreedy(fm, ScorerList({"arm": arm}, zscore=True), cfg).step_from(x0, step=0)
    assert only.collapsed.all() and not only.chosen.any()


def test_a_calibration_takes_such_scores_for_equal():
    fm, data, arm = shipped()
    truth = data.stack()[:, :3]
    problems = Problems(truth, data.spec, 2, None, ())
    found = candidate_scores(fm, problems, {"arm": arm}, TTCConfig(branching_factor=4, stochastic=ALONG), groups=2)
    assert (found.scores["arm"] == found.scores["arm"][:, :1]).all()
    found = candidate_scores(fm, problems, {"arm": arm}, TTCConfig(branching_factor=4, stochastic={"dropout": True}), groups=2)
    assert (found.scores["arm"].amax(1) > found.scores["arm"].amin(1)).all()


class Floored(Scorer):
    """Known scores, 0 to B - 1 by the mean of the candidate, and a floor of its own for every problem."""

    maximum = 100.0

    def __init__(self, floor):
        super().__init__()
        self.floor = floor

    def score_group(self, state, candidates, context):
        return candidates.flatten(2).double().mean(2)

    def spread_floor(self, state, context):
        assert len(state) == len(context.problem_ids)
        return None if self.floor is None else torch.as_tensor(self.floor, dtype=torch.float64)[context.problem_ids]


SEARCHES = {
    "greedy": (TTCGreedy, {}),
    "softmax": (TTCGreedy, {"select": "softmax_mean"}),
    "span": (TTCGreedy, {"select": "span"}),
    "refined": (TTCGreedy, {"refine_steps": 1}),
    "one beam": (TTCBeam, {}),
    "beam": (TTCBeam, {"approach": "beam", "beam_width": 2}),
    "chunks": (TTCBeam, {"approach": "beam", "beam_width": 2, "chunk_size": 3}),
    "diverse": (TTCBeam, {"approach": "diverse_beam", "beam_width": 2}),
    "lookahead": (TTCBeam, {"lookahead": 1}),
    "particles": (TTCBeam, {"approach": "particle", "beam_width": 2, "temperature": 1e-4}),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_takes_candidate_0_below_the_floor_and_is_as_before_above_it(name):
    kind, options = SEARCHES[name]
    fm, x0 = shift_surrogate(), euler_state(3)

    def roll(scorer):
        return kind(fm, scorer, TTCConfig(branching_factor=4, seed=3, **options)).rollout(x0, T=2, return_info=True)

    still = torch.stack([x0, x0.roll(1, -1), x0.roll(2, -1)], 1)
    before, above, below, mixed = (roll(Floored(floor)) for floor in (None, [0.0] * 3, [1e3] * 3, [0.0, 1e3, 0.0]))
    assert torch.equal(before.trajectory, above.trajectory) and torch.equal(before.collapsed, above.collapsed)
    assert not torch.equal(before.trajectory, still)
    torch.testing.assert_close(below.trajectory, still, rtol=0, atol=1e-6)
    assert below.collapsed.all() and not below.chosen.any()
    torch.testing.assert_close(mixed.trajectory[1], still[1], rtol=0, atol=1e-6)
    assert torch.equal(mixed.trajectory[::2], before.trajectory[::2])


class Ranked(Scorer):
    """Scores by position: what of it is rounding is known, 1e-3."""

    def __init__(self, scores, floor=1e-3):
        super().__init__()
        self.scores, self.floor = torch.tensor(scores, dtype=torch.float64), floor

    def score_group(self, state, candidates, context):
        levels = candidates[:, :, 0, 0, 0].double()  # Steps counts in it
        return self.scores[levels.round().long() - state[:, None, 0, 0, 0].round().long()]

    def spread_floor(self, state, context):
        return None if self.floor is None else torch.full((len(state),), self.floor, dtype=torch.float64)


class Steps(Surrogate):
    """Candidate i is i higher; the deterministic step changes nothing."""

    def __init__(self):
        super().__init__(torch.nn.Identity(), StateSpec.euler2d())

    def deterministic(self, x):
        return x.clone()

    def candidates(self, x, ids, *, problem_ids=None, seed=0, step=0, stochastic=None):
        ids = ids.to(x.device).expand(len(x), -1)
        return x.unsqueeze(1) + ids.reshape(*ids.shape, *[1] * (x.ndim - 1)).to(x.dtype)


CHOICES = {  # scores of candidates 0 to 4, what greedy search takes, and what two beams keep of one
    "rounding beside a penalty": ([-1.0, -1.0001, -0.9999, -50.0, -1.0], 0, [0]),
    "the first is the best of them": ([-0.9999, -1.0, -1.0, -50.0, -1.0], 0, [0]),
    "by more than rounding": ([-1.0, -0.998, -1.0, -50.0, -1.0], 1, [1, 0]),
    "the first is penalised": ([-50.0, -1.0, -0.9999, -1.0, -1.0], 2, [2, 1]),
    "and the next is far behind": ([-1.0, -0.9999, -5.0, -2.0, -50.0], 0, [0]),
    "the first is the best by far": ([-1.0, -2.0, -3.0, -2.0, -2.0], 0, [0, 1]),
    "the first cannot be used": ([-math.inf, -1.0, -0.9999, -1.0, -50.0], 2, [2, 1]),
}


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", CHOICES)
def test_what_rounding_alone_tells_from_candidate_0_is_candidate_0_however_low_others_are(name, chunk):
    scores, taken, kept = CHOICES[name]
    collapsed = name in ("rounding beside a penalty", "the first is the best of them", "and the next is far behind")
    x0 = torch.zeros(2, 4, 8, 8)
    cfg = TTCConfig(branching_factor=5, chunk_size=chunk)
    greedy = TTCGreedy(Steps(), Ranked(scores), cfg).rollout(x0, 1, return_info=True)
    assert greedy.chosen.tolist() == [[taken]] * 2 and greedy.collapsed.tolist() == [[collapsed]] * 2
    assert torch.equal(greedy.trajectory[:, 1], x0 + taken)
    beams = TTCBeam(Steps(), Ranked(scores), dataclasses.replace(cfg, approach="beam", beam_width=2)).rollout(x0, 1, return_info=True)
    assert beams.beams[0].positions.tolist() == [kept + [-1] * (2 - len(kept))] * 2
    assert beams.chosen.tolist() == [[taken]] * 2 and beams.collapsed.tolist() == [[collapsed]] * 2
    assert torch.equal(beams.trajectory[:, 1], x0 + taken)
    unknown = TTCGreedy(Steps(), Ranked(scores, None), cfg).rollout(x0, 1, return_info=True)
    assert unknown.chosen.tolist() == [[scores.index(max(scores))]] * 2 and not unknown.collapsed.any()


def test_a_lower_survivor_stays_beside_candidate_0():
    scores = [-1.0, -0.9999, -1.0, -2.0, -50.0]
    cfg = TTCConfig(branching_factor=5, approach="beam", beam_width=4)
    step = TTCBeam(Steps(), Ranked(scores), cfg).rollout(torch.zeros(1, 4, 8, 8), 1, return_info=True).beams[0]
    assert step.positions.tolist() == [[0, 3, -1, -1]] and step.scores[0, :2].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("aggregation", ["sum", "last", "mean", "discounted"])
@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_floor_of_a_continuation_has_that_of_each_score_in_it(aggregation, lookahead):
    cfg = TTCConfig(branching_factor=2, lookahead=lookahead, score_aggregation=aggregation, approach="beam", beam_width=1)
    for floor, taken in ((0.99, 1), (1.01, 0)):  # scores are 1 apart, and stay so
        found = TTCBeam(Steps(), Floored([floor]), cfg).rollout(torch.zeros(1, 4, 8, 8), 3, return_info=True)
        assert found.chosen.tolist() == [[taken] * 3]


def test_floors_of_a_list_add_up_by_weight_and_foreign_scorers_have_none():
    context, state = ScoreContext(0, torch.arange(3)), euler_state(3)
    a, b = Floored([1.0, 2.0, 3.0]), Floored([0.5] * 3)
    both = ScorerList({"a": a, "b": b, "c": lambda x, c: c.flatten(1).mean(1)}, {"a": 2.0, "b": -4.0, "c": 9.0})
    assert both.spread_floor(state, context).tolist() == [4.0, 6.0, 8.0]
    assert ScorerList({"a": a}, zscore=True).spread_floor(state, context) is None
    assert as_scorer(lambda x, c: c.flatten(1).mean(1)).spread_floor(state, context) is None
    assert both.of_projected(lambda s, c, context: c).spread_floor(state, context).tolist() == [4.0, 6.0, 8.0]

    class Mass(ARMScorer):
        def score_group(self, state, candidates, context):
            return -self.terms(state, candidates, context).mass

    assert Mass(ARMWeights(), None).spread_floor(state, context) is None  # the floor of another score says nothing of it


def test_zscores_are_0_up_to_the_floor():
    scores = Floored([0.5, 0.5, 0.5])
    state, candidates = torch.zeros(3, 4, 8, 8), torch.zeros(3, 3, 4, 8, 8)
    for problem, values in enumerate(([0.0, 0.2, 0.5], [0.0, 0.2, 0.6], [-torch.inf, 0.2, 0.1])):
        candidates[problem] = torch.tensor(values).reshape(3, 1, 1, 1)
    got = ScorerList({"a": scores}, zscore=True).score_group(state, candidates, ScoreContext(0, torch.arange(3)))
    assert got[0].tolist() == [0.0, 0.0, 0.0]
    assert got[1].mean().abs() < 1e-6 and got[1].amax() > 1
    assert got[2].tolist() == [-torch.inf, 0.0, 0.0]


class Outlier(Scorer):
    """Candidate 0 has 0, the others a little more, and the last far less, as one has whose density is negative."""

    maximum, needs_group = 100.0, True

    def __init__(self, floor):
        super().__init__()
        self.floor = floor

    def score_group(self, state, candidates, context):
        scores = torch.arange(candidates.shape[1], dtype=torch.float64).expand(candidates.shape[:2]) * 1e-9
        return torch.cat([scores[:, :-1], torch.full_like(scores[:, :1], -50.0)], 1)

    def spread_floor(self, state, context):
        return torch.full((len(state),), self.floor, dtype=torch.float64)


@pytest.mark.parametrize("kind", [TTCGreedy, TTCBeam])
@pytest.mark.parametrize("floor, chosen", [(1e-6, 0), (1e-10, 2)])
def test_one_bad_candidate_does_not_make_a_choice_of_the_rounding_among_the_others(kind, floor, chosen):
    result = kind(shift_surrogate(), Outlier(floor), TTCConfig(branching_factor=4)).rollout(euler_state(2), T=2, return_info=True)
    assert (result.chosen == chosen).all() and (result.collapsed == (chosen == 0)).all()


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_floor_of_declared_fields_bounds_what_rounding_does_to_their_scores(scale):
    spec = StateSpec.fields("q", "u", "v", conserved="all", divergence_free=("u", "v"), cell_volume=0.25)
    state = torch.randn(2, 3, 16, 16) + 3
    exact = state.double().unsqueeze(1) + 1e-7 * torch.rand(
        2, 64, 3, 16, 16, dtype=torch.float64
    )  # less than half a unit in the last place
    scorer = ARMScorer(spec=spec, scale=scale)
    scores = scorer.score_group(state, exact.float(), None)
    floor = scorer.spread_floor(state, None)
    assert floor is not None and bool((scores.amax(1) - scores.amin(1) <= floor).all())
    different = scorer.score_group(state, (exact + 0.01 * torch.randn(2, 64, 3, 1, 1, dtype=torch.float64)).float(), None)
    assert bool((different.amax(1) - different.amin(1) > 10 * floor).all())


def test_a_uniform_flow_has_no_infinite_floor():
    """Its slopes are 0, and so would be the unit of its divergence."""
    spec = StateSpec.fields("u", "v", "bx", "by", divergence_free=[("u", "v"), ("bx", "by")])
    state = torch.ones(2, 4, 8, 8)
    state[1, :2] = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))  # under a uniform field
    floor = ARMScorer(spec=spec).spread_floor(state, None)
    assert 0 < float(floor.min()) <= float(floor.max()) < 1e-5
