"""What a rollout hands to code that is not ours: scorers, members of a list, refinement, tie-breakers, models, readers of its steps."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.surrogates import euler_state
from ttcfast import StateSpec, TTCBeam, TTCConfig, TTCGreedy
from ttcfast.core.base_fm import Surrogate
from ttcfast.rewards.common import ScoreContext, Scorer, ScorerList
from ttcfast.runtime.lent import ChangedInputError
from ttcfast.ttc.refine import refine

SPEC = StateSpec.euler2d(cell_volume=1 / 64)


def surrogate(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Dropout(0.2), nn.Conv2d(8, 4, 1))
    return Surrogate(net, SPEC, predicts="delta", stochastic={"dropout": True}, **options)


def good(x, c):
    return -c.sub(x).square().flatten(1).mean(1)


def in_place(x, c):
    c.sub_(x)
    return -c.square().flatten(1).mean(1)


def through_numpy(x, c):
    c.numpy()[...] -= x.numpy()
    return -c.square().flatten(1).mean(1)


class Batched(Scorer):
    """Writes into whatever ``what`` names."""

    maximum = 0.0
    what: ClassVar[str] = ""

    def _write(self, name, value):
        if self.what == name:
            value.add_(1)

    def score_group(self, state, candidates, context):
        self._write("state", state)
        self._write("candidates", candidates)
        self._write("ids", context.problem_ids)
        return -(candidates - state.unsqueeze(1)).square().flatten(2).mean(2)

    def ascent(self, state, candidates, context):
        self._write("ascent", candidates)
        return 0.1 * (state.unsqueeze(1) - candidates)

    def units(self, state):
        self._write("units", state)
        return state.new_ones(())


def roll(scorer, controller=TTCGreedy, **options):
    return controller(surrogate(), scorer, TTCConfig(branching_factor=3, **options)).rollout(euler_state(2), T=2)


@pytest.mark.parametrize("controller, options", [(TTCGreedy, {}), (TTCBeam, {"approach": "beam", "beam_width": 2})])
@pytest.mark.parametrize("scorer", [in_place, through_numpy])
def test_a_scorer_that_works_in_place_is_told_so(scorer, controller, options):
    roll(good, controller, **options)
    with pytest.raises(ChangedInputError, match=f"scorer {scorer.__name__} changed the candidates"):
        roll(scorer, controller, **options)
    with pytest.raises(ChangedInputError, match=f"scorer {scorer.__name__} changed the candidates"):
        roll(ScorerList({"a": good, "b": scorer}, zscore=True), controller, **options)
    with torch.inference_mode(), pytest.raises(ChangedInputError, match="changed the candidates"):
        roll(scorer, controller, **options)


@pytest.mark.parametrize(
    "what, options",
    [
        ("state", {}),
        ("candidates", {}),
        ("ids", {}),
        ("ascent", {"refine_steps": 1}),
        ("units", {"select": "span", "trust": 0.5}),
    ],
)
def test_methods_of_a_subclass_are_held_too(what, options):
    class Writing(Batched):
        pass

    roll(Writing(), **options)
    Writing.what = what
    name = {"ids": r"context\.problem_ids", "ascent": "candidates", "units": "state"}.get(what, what)
    with pytest.raises(ChangedInputError, match=f"scorer (Writing|Batched) changed the {name}"):
        roll(Writing(), **options)


def test_refinement_by_itself_and_the_tie_breaker():
    class Writing(Batched):
        what = "ascent"

    x = euler_state(2)
    with pytest.raises(ChangedInputError, match="changed the candidates"):
        refine(x, torch.rand(2, 3, 4, 8, 8), Writing(), ScoreContext(0, torch.arange(2)), steps=1, lengths=(1.0,))
    config = TTCConfig(branching_factor=3, approach="beam", beam_width=2)
    with pytest.raises(ChangedInputError, match="scorer in_place changed the candidates"):
        TTCBeam(surrogate(), good, config, tie_breaker=in_place).rollout(x, T=1)


def test_a_step_handed_out_is_the_readers_own():
    for controller, options in ((TTCGreedy, {}), (TTCBeam, {"approach": "beam", "beam_width": 2})):
        search = controller(surrogate(), good, TTCConfig(branching_factor=3, **options))
        kept = [out.state.clone() for out in search.rollout_iter(euler_state(2), T=3)]
        changed = []
        for out in search.rollout_iter(euler_state(2), T=3):
            changed.append(out.state.clone())
            out.state.numpy()[...] = 0
            out.frozen.fill_(True)
            out.chosen.zero_()
        assert all(torch.equal(a, b) for a, b in zip(kept, changed, strict=True)), controller


def test_a_model_that_works_in_place_keeps_its_hands_off_the_rollout():
    class InPlace(nn.Module):
        def __init__(self, writes):
            super().__init__()
            self.net, self.writes = surrogate().model, writes

        def forward(self, z):
            return self.net(z.mul_(2) if self.writes else z * 2)

    class Foreign:
        def __init__(self, writes):
            self.writes = writes

        @torch.no_grad()
        def sample_next(self, x_t, seed=None, multi=False):
            move = 0.1 * torch.randn_like(x_t)
            return x_t.add_(move) if self.writes else x_t + move

    class Answers(Surrogate):
        def candidates(self, x, ids, **options):
            out = super().candidates(x, ids, **options)
            x.zero_()
            return out

    def rolled(fm, b=3):
        return TTCGreedy(fm, good, TTCConfig(branching_factor=b)).rollout(euler_state(2), T=2)

    whole = [Surrogate(InPlace(w), SPEC, predicts="delta", stochastic={"dropout": True}) for w in (False, True)]
    assert torch.equal(*map(rolled, whole))
    x = euler_state(2)
    assert torch.equal(whole[0](x), whole[1](x)) and torch.equal(x, euler_state(2))
    assert torch.equal(rolled(Foreign(False)), rolled(Foreign(True)))
    assert torch.equal(rolled(Foreign(False), 1), rolled(Foreign(True), 1))
    with pytest.raises(ChangedInputError, match=r"Answers\.candidates changed the state"):
        rolled(Answers(surrogate().model, SPEC, predicts="delta", stochastic={"dropout": True}))


def test_a_models_own_deterministic_step_is_held_too():
    class Working:
        spec, history = SPEC, ["losses of its training"]  # no number, so no length of a window

        def __init__(self, in_place):
            self.in_place = in_place

        def deterministic(self, x):
            return x.add_(0.1) if self.in_place else x + 0.1

        def sample_next(self, x, seed, multi=False):
            return x + 0.1 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed))

    def search(in_place):
        return TTCGreedy(Working(in_place), good, TTCConfig(branching_factor=2)).rollout(euler_state(2), 2)

    assert search(False).shape == (2, 3, 4, 8, 8)
    with pytest.raises(ChangedInputError, match=r"Working.deterministic changed the state"):
        search(True)
