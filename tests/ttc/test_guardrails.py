import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.surrogates import Foreign, Shift, brittle, drop_surrogate, euler_state, shift_surrogate
from ttcfast.core.base_fm import Surrogate
from ttcfast.rewards.common import ARMScorer, Scorer
from ttcfast.spec import ARMWeights, StateSpec, StochasticConfig, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.guardrails import Spread
from ttcfast.ttc.inference import TTCGreedy

ARM = ARMScorer(ARMWeights(), 1.0, momentum="sum", scale="relative")


class Blind(Scorer):
    """Prefers the last candidate, whatever it is: what a reward that does not notice NaN would do."""

    def score_group(self, state: Tensor, candidates: Tensor, context) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return torch.arange(candidates.shape[1]).expand(candidates.shape[:2]) + 1000.0 * self.count


@pytest.mark.parametrize("scorer", [ARM, Blind()])
def test_candidates_that_are_not_finite_never_win(scorer):
    x0 = euler_state(4)
    limit = float(x0[:, 0, 0, 0].max()) + 0.02
    cfg = TTCConfig(branching_factor=8, include_deterministic=False)
    r = TTCGreedy(brittle(limit, 0.1), scorer, cfg).rollout(x0, 1, return_info=True)
    assert r.nonfinite.sum() > 0 and r.trajectory.isfinite().all()
    assert torch.equal(r.scores.isinf().sum(2), r.nonfinite)
    assert bool(r.scores.gather(2, r.chosen.unsqueeze(2)).isfinite().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_never_win(value):
    def score(x_t, cand):
        s = cand[:, 0, 0, 0].clone()
        s[s.argmax()] = value
        return s

    r = TTCGreedy(Foreign(), score, TTCConfig(branching_factor=4)).rollout(euler_state(), 2, return_info=True)
    assert bool((r.nonfinite == 1).all()) and r.fallbacks.sum() == 0
    assert bool(r.scores.gather(2, r.chosen.unsqueeze(2)).isfinite().all())


class SilentLater(Scorer):
    """No score for problems 1 and 2 from step 1 on."""

    def score_group(self, state, candidates, context):
        silent = (context.problem_ids > 0) & (context.step > 0)
        return torch.where(silent.unsqueeze(1), torch.nan, candidates[:, :, 0, 0, 0])


SEARCHES = {
    "greedy": (TTCGreedy, {}),
    "chunks": (TTCGreedy, {"chunk_size": 2}),
    "softmax": (TTCGreedy, {"select": "softmax_mean"}),
    "beam": (TTCBeam, {"approach": "beam", "beam_width": 2, "chunk_size": 3}),
    "diverse": (TTCBeam, {"approach": "diverse_beam", "beam_width": 2}),
    "particle": (TTCBeam, {"approach": "particle", "beam_width": 2}),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_scorer_without_a_score_for_finite_candidates_is_said_once_a_rollout(search):
    kind, options = SEARCHES[search]
    controller, x0 = kind(shift_surrogate(), SilentLater(), TTCConfig(branching_factor=4, **options)), euler_state(3)
    for _ in range(2):  # once in each
        with pytest.warns(RuntimeWarning) as said:
            r = controller.rollout(x0, 4, return_info=True)
        assert len(said) == 1 and said[0].filename == __file__
        assert str(said[0].message).startswith(
            "step 1: scorer SilentLater returned no finite score for problems [1, 2], though there are finite candidates; the "
            "deterministic step is taken instead."
        )
        assert torch.equal(r.fallbacks, (torch.arange(3) > 0).unsqueeze(1) & (torch.arange(4) > 0))
    with pytest.warns(RuntimeWarning, match=r"step 3: scorer SilentLater .* problems \[7\]"):
        controller.step_from(x0[:1], step=3, problem_ids=torch.tensor([7]))


def test_the_sample_that_is_taken_for_want_of_a_score_is_named():
    def nothing(x_t, cand):
        return cand[:, 0, 0, 0] * torch.nan

    with pytest.warns(RuntimeWarning, match=r"step 0: scorer nothing returned no finite score .* one fresh sample is taken instead"):
        TTCGreedy(Foreign(), nothing, TTCConfig(branching_factor=3)).rollout(euler_state(), 1)


@pytest.mark.parametrize("kind", [TTCGreedy, TTCBeam])
def test_a_scorer_is_not_blamed_for_candidates_that_are_not_finite(kind):
    fm = Foreign(spoil=lambda out, call: out * torch.nan if call < 4 else out)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        r = kind(fm, lambda x, c: c[:, 0, 0, 0], TTCConfig(branching_factor=4)).rollout(euler_state(), 1, return_info=True)
    assert r.fallbacks.all() and r.trajectory.isfinite().all()


@pytest.mark.parametrize("kind", [TTCGreedy, TTCBeam])
def test_a_scorer_that_returns_another_shape_is_told_the_right_one(kind):
    class Flat(Scorer):
        def score_group(self, state, candidates, context):
            return candidates.flatten(1).sum(1)

    with pytest.raises(ValueError, match=r"Flat returned shape \(3,\); expected \(3, 4\): return one score per candidate, \[N, B\], from"):
        kind(shift_surrogate(), Flat(), TTCConfig(branching_factor=4)).rollout(euler_state(), 1)


def test_a_group_without_a_usable_candidate_is_drawn_again_and_only_that():
    x0 = euler_state(3)

    def spoil(out: Tensor, call: int) -> Tensor:
        if call == 1:
            out.view(3, 4, *out.shape[1:])[1] = torch.nan  # all candidates of problem 1
        return out

    fm = Foreign(spoil=spoil)
    r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=4)).rollout(x0, 2, return_info=True)
    assert fm.batches == [12, 4, 12] and r.nfe == 28
    assert r.resamples.tolist() == [[0, 0], [1, 0], [0, 0]]
    assert r.nonfinite.tolist() == [[0, 0], [4, 0], [0, 0]]
    assert r.trajectory.isfinite().all() and r.fallbacks.sum() == 0 and r.scores.isfinite().all()
    untouched = TTCGreedy(Foreign(), ARM, TTCConfig(branching_factor=4)).rollout(x0, 1)
    assert torch.equal(untouched[[0, 2], 1], r.trajectory[[0, 2], 1])


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_after_the_last_resampling_the_deterministic_step_is_taken(rounds):
    class HoldsWithoutNoise(Shift):
        """Breaks down wherever the first problem's marked cell was touched by noise."""

        def forward(self, x: Tensor) -> Tensor:
            bad = (x[:, 0, 0, 0] > 4.0) & (x[:, 0, 0, 0] != 5.0)
            return torch.where(bad.reshape(-1, 1, 1, 1), torch.nan, x.roll(1, -1))

    x0 = euler_state(3)
    x0[1, 0, 0, 0] = 5.0
    fm = Surrogate(HoldsWithoutNoise(), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=0.01))
    cfg = TTCConfig(branching_factor=4, include_deterministic=False, max_resample=rounds)
    r = TTCGreedy(fm, Blind(), cfg).rollout(x0, 1, return_info=True)
    assert r.fallbacks.tolist() == [[False], [True], [False]]
    assert r.resamples.tolist() == [[0], [rounds], [0]]
    assert r.nonfinite.tolist() == [[0], [4 * (rounds + 1)], [0]]
    assert r.chosen[1].item() == -1 and r.nfe == 12 + 4 * rounds + 1
    assert torch.equal(r.trajectory[1, 1], x0[1].roll(1, -1))


def test_a_foreign_model_falls_back_to_one_fresh_sample():
    fm = Foreign(spoil=lambda out, call: out * torch.nan if call <= 3 else out)
    r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=4)).rollout(euler_state(2), 1, return_info=True)
    assert fm.batches == [8, 8, 8, 2] and r.nfe == 26
    assert r.fallbacks.all() and r.trajectory.isfinite().all() and bool((r.chosen == -1).all())


def test_a_problem_that_nothing_saves_is_frozen_and_the_others_go_on():
    x0 = euler_state(3)
    x0[1, 0, 0, -2] = 50.0  # reaches the first cell at step 2: finite until then
    fm = brittle(40.0, 0.01)
    cfg = TTCConfig(branching_factor=3, max_resample=1)
    with pytest.warns(RuntimeWarning, match=r"step 2: no finite next state for problems \[1\].*they are NaN from here on"):
        r = TTCGreedy(fm, ARM, cfg).rollout(x0, 5, return_info=True)
    assert r.frozen.tolist() == [[False] * 5, [False, False, True, True, True], [False] * 5]
    assert r.trajectory[1, 3:].isnan().all() and r.trajectory[1, :3].isfinite().all()
    assert r.trajectory[[0, 2]].isfinite().all()
    assert r.chosen[1].tolist()[2:] == [-1, -1, -1] and r.fallbacks[1].tolist() == [False, False, True, False, False]
    assert r.resamples[1].tolist() == [0, 0, 1, 0, 0]
    assert r.nfe == 3 * 3 * 3 + 2 + 2 * 3 * 2  # three steps of all, two drawn again, two steps of the others


def test_all_problems_frozen_still_gives_a_whole_result():
    fm = Foreign(spoil=lambda out, call: out * torch.nan)
    with pytest.warns(RuntimeWarning, match="no finite next state"):
        r = TTCGreedy(fm, ARM, TTCConfig(branching_factor=2, max_resample=0)).rollout(euler_state(2), 3, return_info=True)
    assert r.trajectory.shape == (2, 4, 4, 8, 8) and r.trajectory[:, 1:].isnan().all()
    assert r.frozen.all() and r.nfe == 6 and r.interventions()["fallbacks"] == 2


def test_a_step_whose_scores_collapse_takes_candidate_0():
    x0, fm = euler_state(), shift_surrogate()
    r = TTCGreedy(fm, lambda x, c: 1.0 + 1e-8 * c[:, 0, 0, 0].double(), TTCConfig(branching_factor=4)).rollout(x0, 3, return_info=True)
    assert r.collapsed.all() and bool((r.chosen == 0).all()) and r.fallbacks.sum() == 0
    assert torch.equal(r.trajectory[:, -1], x0.roll(3, -1))
    strict = TTCConfig(branching_factor=4, min_score_spread=0.0)
    r = TTCGreedy(fm, lambda x, c: 1.0 + 1e-8 * c[:, 0, 0, 0].double(), strict).rollout(x0, 3, return_info=True)
    assert not r.collapsed.any() and r.chosen.sum() > 0


def test_a_collapse_without_a_usable_candidate_0_takes_the_first_usable():
    def spoil(out: Tensor, call: int) -> Tensor:
        out.view(3, 4, *out.shape[1:])[:, 0] = torch.inf
        return out

    r = TTCGreedy(Foreign(spoil=spoil), lambda x, c: torch.ones(len(c)), TTCConfig(branching_factor=4)).rollout(
        euler_state(), 1, return_info=True
    )
    assert bool((r.chosen == 1).all()) and not r.collapsed.any() and r.trajectory.isfinite().all()


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.floats(0, 1e-2))
def test_the_spread_is_relative(values, least):
    s = torch.tensor([values], dtype=torch.float64)
    got = Spread.of(s).flat(least).item()
    assert got == (len(values) > 1 and max(values) - min(values) <= least * max(map(abs, values)))
    assert Spread.of(torch.cat([s, torch.full((1, 1), -torch.inf).double()], 1)).flat(least).item() == got


def test_a_score_floor_sends_a_penalised_step_to_the_deterministic_one():
    x0, fm = euler_state(), shift_surrogate(0.05)

    def harsh(x, c):
        return -1.0 - c[:, 0, 0, 0]

    r = TTCGreedy(fm, harsh, TTCConfig(branching_factor=4, score_floor=-1.0)).rollout(x0, 2, return_info=True)
    assert r.fallbacks.all() and bool((r.chosen == 0).all()) and bool((r.resamples == 2).all()) and not r.collapsed.any()
    assert torch.equal(r.trajectory[:, -1], x0.roll(2, -1))
    lenient = TTCGreedy(fm, harsh, TTCConfig(branching_factor=4, score_floor=-1e9)).rollout(x0, 2, return_info=True)
    assert lenient.fallbacks.sum() == 0 and lenient.chosen.sum() > 0
    outside = TTCGreedy(fm, harsh, TTCConfig(branching_factor=4, score_floor=-1.0, include_deterministic=False)).rollout(
        x0, 2, return_info=True
    )
    assert torch.equal(outside.trajectory[:, -1], x0.roll(2, -1)) and bool((outside.chosen == -1).all()) and outside.nfe == 2 * 3 * 13


def test_a_step_below_the_floor_is_drawn_again_until_a_candidate_reaches_it():
    calls = []

    def warming(x, c):
        calls.append(len(c))
        level = 0.0 if len(calls) > 1 else -10.0  # all candidates, then those with noise anew
        return level - 0.1 * c[:, 0, 0, 0]

    cfg = TTCConfig(branching_factor=4, score_floor=-1.0)
    r = TTCGreedy(shift_surrogate(), warming, cfg).rollout(euler_state(1), 1, return_info=True)
    assert r.resamples.tolist() == [[1]] and not r.fallbacks.any() and r.chosen.item() > 0 and r.scores.max() > -1


def test_a_candidate_below_the_floor_is_kept_where_the_fallback_is_not_finite():
    class FailsWithoutNoise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            quiet = (x == x0).flatten(1).all(1)
            return torch.where(quiet.reshape(-1, 1, 1, 1), torch.nan, x.roll(1, -1))

    x0 = euler_state(1)
    fm = Surrogate(FailsWithoutNoise(), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=0.01))
    for include in (True, False):
        cfg = TTCConfig(branching_factor=4, score_floor=0.0, include_deterministic=include)
        r = TTCGreedy(fm, lambda x, c: -1.0 - c[:, 0, 0, 0], cfg).rollout(x0, 1, return_info=True)
        assert r.fallbacks.all() and not r.frozen.any() and r.trajectory.isfinite().all()
        assert r.chosen.item() == r.scores[0, 0].argmax() and r.scores.max() == -1.0 - r.trajectory[0, 1, 0, 0, 0]


def test_a_bad_round_of_resampling_does_not_lose_the_candidate_before_it():
    fm = Foreign(spoil=lambda out, call: out * torch.nan if call > 1 else out)
    cfg = TTCConfig(branching_factor=4, score_floor=0.0)
    r = TTCGreedy(fm, lambda x, c: -1.0 - c[:, 0, 0, 0], cfg).rollout(euler_state(2), 1, return_info=True)
    assert fm.batches == [8, 8, 8, 2] and not r.frozen.any() and r.trajectory.isfinite().all() and r.scores.isfinite().all()


def test_what_is_not_random_is_not_drawn_again():
    cfg = TTCConfig(branching_factor=1, score_floor=0.0)
    r = TTCGreedy(shift_surrogate(), lambda x, c: -torch.ones(len(c)), cfg).rollout(euler_state(), 2, return_info=True)
    assert r.nfe == 2 * 3 and r.resamples.sum() == 0 and r.fallbacks.all() and not r.frozen.any()


def test_a_problem_that_grows_huge_is_not_called_deterministic():
    class Grows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.roll(1, -1) + (x - 1.0).clamp_min(0) * 1e12  # rounding swallows the noise from the second step on

    fm = Surrogate(Grows(), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=1e-6))
    for n in (1, 2):
        x0 = euler_state(n) * 0.1
        x0[0] = 2.0
        assert TTCGreedy(fm, Blind(), TTCConfig(branching_factor=4)).rollout(x0, 2).isfinite().all()


def test_a_real_net_whose_dropout_overflows_takes_a_candidate_that_did_not():
    fm = drop_surrogate()
    fm.model.drop = nn.Dropout2d(0.5)
    with torch.no_grad():
        fm.model.lift.bias[0] = 50.0  # the first feature is 1; kept, dropout doubles it beyond float32's range behind the head
        fm.model.head.weight[:, 0] = 2.5e38
    cfg = TTCConfig(branching_factor=8, include_deterministic=False, max_resample=4)
    r = TTCGreedy(fm, Blind(), cfg).rollout(euler_state(), 3, return_info=True)
    assert 0 < r.nonfinite.sum() < r.nfe
    assert r.trajectory.isfinite().all() and r.trajectory.abs().max() < 1e30


@pytest.mark.parametrize(
    "option, value",
    [
        ("approach", "beam"),
        ("beam_width", 2),
        ("score_aggregation", "mean"),
        ("lookahead", 1),
        ("temperature", 0.5),
    ],
)
def test_options_of_other_searches_are_not_ignored(option, value):
    with pytest.raises(ValueError, match=rf"{option} is {value!r}.*TTCGreedy does not do; use {option}="):
        TTCGreedy(shift_surrogate(), ARM, TTCConfig(**{option: value}))


def roll(x0: Tensor, T: object = 2, fm: object = None, **options: object) -> Tensor:
    return TTCGreedy(fm or shift_surrogate(), ARM, TTCConfig(**options)).rollout(x0, T)  # type: ignore[arg-type, call-overload]


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_t_below_one(steps):
    with pytest.raises(ValueError, match=r"T is .*; give a whole number of steps, at least 1"):
        roll(euler_state(), steps)


@pytest.mark.parametrize(
    "x0, message",
    [
        (torch.zeros(4, 8), r"x0 is torch.float32 of shape \(4, 8\); expected floating point \[C, S, S\] or \[N, C, S, S\]"),
        (torch.zeros(2, 3, 8, 8), r"x0 has 3 channels \(shape \(2, 3, 8, 8\)\); the surrogate's StateSpec has 4"),
        (torch.zeros(0, 4, 8, 8), "no problem; give at least one"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.int32), "x0 is torch.int32"),
        (euler_state() / torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1, 1), r"x0 is not finite in problems \[1\]"),
    ],
)
def test_wrong_start(x0, message):
    with pytest.raises(ValueError, match=message):
        roll(x0)
    with pytest.raises(ValueError, match=message):
        TTCGreedy(shift_surrogate(), ARM).rollout_iter(x0, 2)  # before the first step is asked for


def test_wrong_models_scorers_and_configs():
    with pytest.raises(ValueError, match="branching_factor is 0; it must be at least 1"):
        TTCConfig(branching_factor=0)
    with pytest.raises(TypeError, match=r"fm is a Shift; give a Surrogate, or an object with sample_next"):
        TTCGreedy(Shift(), ARM)
    with pytest.raises(TypeError, match="scorer is a NoneType"):
        TTCGreedy(shift_surrogate(), None)
    with pytest.raises(ValueError, match="cfg is a dict; give a TTCConfig"):
        TTCGreedy(shift_surrogate(), ARM, {"branching_factor": 3})
    with pytest.raises(ValueError, match=r"include_deterministic is True but Foreign has only sample_next"):
        TTCGreedy(Foreign(), ARM, TTCConfig(include_deterministic=True))
    with pytest.raises(ValueError, match=r"problem_ids are torch.int64 \(2,\); give one integer for each of the 3 problems"):
        TTCGreedy(shift_surrogate(), ARM).rollout(euler_state(), 1, problem_ids=torch.arange(2))
    with pytest.warns(UserWarning, match=r"is left to Foreign.sample_next"):
        TTCGreedy(Foreign(), ARM, TTCConfig(stochastic={"dropout": True}))


def test_a_foreign_model_that_returns_something_else():
    with pytest.raises(
        ValueError, match=r"sample_next returned torch.float64 \(6, 4, 8, 8\) on cpu; expected what it was given, torch.float32"
    ):
        roll(euler_state(), fm=Foreign(spoil=lambda out, call: out.double()), branching_factor=2)
    with pytest.raises(ValueError, match="sample_next returned a tuple"):
        roll(euler_state(), fm=Foreign(spoil=lambda out, call: (out,)), branching_factor=2)
