"""Candidates under symmetries of the layout: keyed, exact for an equivariant model, averaged, refined in their own frames."""

import pytest
import torch
from torch import nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.rewards.common import ScoreContext, Scorer
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.states.symmetry import Frames
from ttcfast.stochastic_sampling.distinct import DeterministicModelError
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.refine import refine

SPEC = StateSpec.euler2d(cell_volume=1 / 64)
ALONE = {"dropout": False, "symmetry": True}


class Lopsided(nn.Module):
    """Treats every orientation in another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.drop, self.calls = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Dropout(0.2), []

    def forward(self, x):
        self.calls.append(len(x))
        return x + 0.1 * self.conv(self.drop(x))


class Diffusing(nn.Module):
    """Commutes with every symmetry."""

    def forward(self, x):
        return 0.5 * x + 0.125 * sum(x.roll(s, a) for s in (1, -1) for a in (2, 3))


class Pulled(Scorer):
    """Climbs towards a pattern that has no symmetry, and scores by the distance to it."""

    maximum = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.goal = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))

    def score_group(self, state, candidates, context):
        return -(candidates - self.goal).square().flatten(2).mean(2)

    def ascent(self, state, candidates, context):
        return 0.1 * (self.goal - candidates) + 0.1 * state.unsqueeze(1).tanh()


def states(n=3):
    x = 0.1 * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x + torch.tensor([1.0, 0.0, 0.0, 2.5]).view(4, 1, 1)


def frames(x, ids, problems=None, step=0):
    problems = torch.arange(len(x)) if problems is None else problems
    return Frames(SPEC, (8, 8), ids.expand(len(x), -1), problems, seed=0, step=step)


def test_a_candidate_is_the_models_step_in_its_frame_and_a_function_of_its_key():
    fm, x, ids, problems = Surrogate(Lopsided(), SPEC, stochastic=ALONE), states(), torch.arange(12), torch.tensor([4, 7, 9])
    whole = fm.candidates(x, ids, problem_ids=problems, seed=0, step=2)
    own = frames(x, ids, problems, step=2)
    for n, b in ((0, 0), (1, 5), (2, 11)):
        g = own.elements[n][b]
        torch.testing.assert_close(whole[n, b], g.undo(fm.deterministic(g.apply(x[n : n + 1], SPEC))[0], SPEC), atol=1e-6, rtol=1e-6)
    assert torch.equal(whole[:, 0], fm.deterministic(x)) and not torch.allclose(whole[0, 1], whole[0, 2])
    part = fm.candidates(x[1:2], torch.tensor([11, 3]), problem_ids=problems[1:2], seed=0, step=2)
    torch.testing.assert_close(part[0], whole[1, [11, 3]], atol=1e-6, rtol=1e-6)


def test_all_candidates_go_through_the_model_at_once():
    net = Lopsided()
    fm = Surrogate(net, SPEC, stochastic=ALONE)
    net.calls.clear()
    fm.candidates(states(), torch.arange(1, 8), seed=0, step=1)
    assert net.calls == [21]


def test_an_equivariant_model_gives_equal_candidates_and_is_told_so():
    fm, x = Surrogate(Diffusing(), SPEC, stochastic=ALONE), states()
    drawn = fm.candidates(x, torch.arange(16), seed=0, step=1)
    torch.testing.assert_close(drawn, fm.deterministic(x).unsqueeze(1).expand_as(drawn), atol=1e-6, rtol=0)
    with pytest.raises(DeterministicModelError):
        TTCGreedy(Surrogate(nn.Identity(), SPEC, stochastic=ALONE), Pulled(), TTCConfig(branching_factor=4)).rollout(x, 1)


def test_noise_acts_in_the_frames_too():
    fm, x = Surrogate(Lopsided(), SPEC, stochastic={"symmetry": True}), states()
    ids = torch.arange(1, 9)
    drawn = fm.candidates(x, ids, seed=0, step=1)
    own = frames(x, ids, step=1)
    seen = own.into(x.unsqueeze(1).expand(3, 8, 4, 8, 8))
    noisy = fm.candidates(seen[1, 3:4], ids[3:4], problem_ids=torch.tensor([1]), seed=0, step=1, stochastic={"dropout": True})[0, 0]
    torch.testing.assert_close(drawn[1, 3], own.elements[1][3].undo(noisy, SPEC), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 6])
def test_the_mean_of_the_symmetries_is_the_ensemble_without_training(chunk):
    fm, x = Surrogate(Lopsided(), SPEC, stochastic=ALONE), states()
    cfg = TTCConfig(branching_factor=8, select="mean", project="conservation", chunk_size=chunk)
    found = TTCGreedy(fm, Pulled(), cfg).rollout(x, 2, return_info=True)
    state = x
    for step in range(2):
        mean = fm.candidates(state, torch.arange(8), seed=0, step=step).mean(1)
        state = mean - (mean - state).mean((2, 3), keepdim=True)
        torch.testing.assert_close(found.trajectory[:, step + 1], state, atol=1e-5, rtol=1e-5)
    assert found.evaluations == 2 * 8 * 3


@pytest.mark.parametrize("chunk", [None, 9])
def test_the_mean_of_refined_candidates_moves_each_in_its_own_frame(chunk):
    fm, x, scorer = Surrogate(Lopsided(), SPEC, stochastic=ALONE), states(), Pulled()
    cfg = TTCConfig(branching_factor=8, select="mean", refine_steps=2, refine_lengths=(1.0,), trust=None, chunk_size=chunk)
    found = TTCGreedy(fm, scorer, cfg).rollout(x, 1, return_info=True)
    ids = torch.arange(8)
    own, drawn = frames(x, ids), fm.candidates(x, ids, seed=0, step=0)
    members = []
    for n in range(3):
        for b in range(8):
            g = own.elements[n][b]
            state, candidate = g.apply(x[n : n + 1], SPEC), g.apply(drawn[n, b], SPEC)[None, None]
            for _ in range(2):
                candidate = candidate + scorer.ascent(state, candidate, None)
            members.append(g.undo(candidate[0, 0], SPEC))
    expected = torch.stack(members).unflatten(0, (3, 8)).mean(1)
    torch.testing.assert_close(found.trajectory[:, 1], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        refine(x, drawn, scorer, ScoreContext(0, ids[:3]), steps=2, lengths=(1.0,))[:, 16:].mean(1), expected, atol=1e-3
    )


@pytest.mark.parametrize(
    "controller, options",
    [(TTCGreedy, {}), (TTCBeam, {"approach": "beam", "beam_width": 3}), (TTCBeam, {"approach": "particle", "beam_width": 3})],
)
@pytest.mark.parametrize("refined", [{}, {"refine_steps": 1}])
def test_searches_take_them_like_other_candidates(controller, options, refined):
    x = states()
    runs = [
        controller(
            Surrogate(Lopsided(), SPEC, stochastic=ALONE), Pulled(), TTCConfig(branching_factor=6, chunk_size=chunk, **options, **refined)
        )
        for chunk in (None, 7)
    ]
    whole, parts = (run.rollout(x, 3) for run in runs)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    alone = runs[0].rollout(x[1:2], 3, problem_ids=torch.tensor([1]))
    torch.testing.assert_close(alone, whole[1:2], atol=1e-5, rtol=1e-5)


def test_a_layout_without_symmetries_is_one_clear_error():
    fm = Surrogate(nn.Conv2d(1, 1, 1), StateSpec.fields("u"), stochastic=ALONE)
    with pytest.raises(ValueError, match=r"stochastic\.symmetry is true and the layout declares no symmetry; give StateSpec"):
        fm.candidates(torch.randn(1, 1, 8, 8), torch.arange(3), seed=0, step=0)


def test_fields_among_the_inputs_are_refused():
    class Forced(Lopsided):
        def forward(self, x, *, force):
            return super().forward(x) + (force if force.ndim > 1 else force.reshape(-1, 1, 1, 1))

    number = Surrogate(Forced(), SPEC, stochastic=ALONE, inputs=lambda context: {"force": 0.5})
    assert number.candidates(states(), torch.arange(3), seed=0, step=0).shape == (3, 3, 4, 8, 8)
    field = Surrogate(Forced(), SPEC, stochastic=ALONE, inputs=lambda c: {"force": torch.zeros(len(c.problem_ids), 4, 8, 8)})
    with pytest.raises(ValueError, match=r"inputs gives fields \(force\), which no symmetry turns; make them given channels of the state"):
        field.candidates(states(), torch.arange(3), seed=0, step=0)
