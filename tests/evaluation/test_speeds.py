"""Seconds per frame of surrogate and solver, grid by grid."""

import dataclasses

import pytest
import torch

from tests.small_run import SPEC, problems, surrogate
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.evaluation import speeds as module
from ttcfast.evaluation.breakeven import EqualError
from ttcfast.evaluation.speeds import BatchSpeeds, Speeds, measure_speeds
from ttcfast.models import ViT, ViTConfig
from ttcfast.models.grid_solvers import EulerGrids, StepSolver
from ttcfast.models.on_grid import on_other_grid

GAS = EulerGrids(SPEC, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))
LAWS = BatchSpeeds(1, {n: 2e-5 * n**2 for n in (8, 16, 32)}, {n: 1e-6 * n**3 for n in (8, 16, 32)})  # cross at 20 / factor^3


@pytest.fixture(autouse=True)
def three_calls(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 0.0)


def vit():
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(16, 16), width=8, depth=1, heads=1, refine=2))
    torch.nn.init.normal_(model.out.weight, std=0.3)
    return Surrogate(model, SPEC, normalizer=Normalizer(torch.zeros(4), torch.ones(4), torch.ones(4)), predicts="delta")


def test_half_and_twice_the_grid_are_timed_at_every_batch_size():
    found = measure_speeds(surrogate(), problems(2, 2), GAS, (1, 5))
    assert [each.batch for each in found.batches] == [1, 5] and found.notes == () and found.cells == 16
    for each in found.batches:
        assert list(each.surrogate) == list(each.solver) == [8, 16, 32]
        assert all(0 < s < 10 for s in (*each.surrogate.values(), *each.solver.values()))


def test_both_see_the_states_of_a_grid(monkeypatch):
    seen = []
    fm, given = surrogate(), problems(2, 2)
    monkeypatch.setattr(fm, "deterministic", lambda x, problem_ids: seen.append((x, problem_ids.tolist())))
    measure_speeds(fm, given, GAS, (3,))
    half, own, twice = (next(x for x, _ in seen if x.shape[-1] == n) for n in (8, 16, 32))
    assert seen[0][1] == [0, 1, 0] and torch.equal(own, given.truth[[0, 1, 0], 0])
    torch.testing.assert_close(half[:, :, 0, 0], own[:, :, :2, :2].mean((2, 3)))
    assert torch.equal(twice[:, :, ::2, 1::2], own)


def test_a_problem_has_its_own_gamma_on_every_grid():
    spec = SPEC.replace(gamma=torch.tensor([1.3, 1.5]))
    given = dataclasses.replace(problems(2, 2), spec=spec)
    solver = EulerGrids(spec, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))
    found = measure_speeds(surrogate(), given, solver, (1, 3))
    assert found.notes == () and all(len(each.solver) == 3 for each in found.batches)


def test_a_grid_that_one_of_both_refuses_is_a_note():
    fm = surrogate()
    fm.model.register_forward_pre_hook(lambda model, args: torch.zeros(16) + args[0])
    found = measure_speeds(fm, problems(2, 2), StepSolver(lambda x: x.roll(1, -2), (16, 16)), (1, 2))
    assert [list(each.surrogate) for each in found.batches] == [list(each.solver) for each in found.batches] == [[16], [16]]
    assert len(found.notes) == 4 and "without the surrogate on 8 x 8 cells" in found.notes[0]
    assert "without the solver 8x8: eval.solvers is [8]; a step of one's own" in found.notes[1]
    assert found.sentences()[0].endswith("; one grid says nothing of others.") and found.record()["batches"][0]["breakeven_cells"] is None


def test_a_vit_keeps_its_weights_on_another_grid():
    small = vit()
    large = on_other_grid(small, (32, 32))
    x = problems(2, 2).truth[:, 0]
    assert large.deterministic(x.repeat(1, 1, 2, 2)).shape == (2, 4, 32, 32) and on_other_grid(small, (16, 16)) is small
    assert all(torch.equal(a, b) for a, b in zip(small.model.state_dict().values(), large.model.state_dict().values(), strict=True))
    assert not large.model.training and on_other_grid(surrogate(), (8, 8)).model.bias == 0.02
    assert [list(each.surrogate) for each in measure_speeds(small, problems(2, 2), GAS, (1,)).batches] == [[8, 16, 32]]


@pytest.mark.parametrize(
    "equal, cells, said",
    [
        (None, 20, "on the same grid, since the table has no row of a solver"),
        (EqualError(8.0, "between measured grids"), 160, "0.5 times the cells per axis"),
        (EqualError(8.0, "above all measured"), 160, "at most 0.5 times the cells per axis"),
        (EqualError(16.0, "below all measured"), 20, "at least 1 times the cells per axis"),
    ],
)
def test_the_sentence_says_from_which_grid_on_the_surrogate_is_faster(equal, cells, said):
    found = Speeds(16, equal, False, (LAWS,))
    assert found.record()["batches"][0]["breakeven_cells"] == pytest.approx(cells)
    (sentence,) = found.sentences()
    bound = "at least " if said.startswith("at most") else "at most " if said.startswith("at least") else "about "
    assert said in sentence and f"equal error from {bound}{cells} cells per axis on" in sentence
    assert ("extrapolated from 8 to 32" in sentence) == (cells == 160)


def test_a_surrogate_whose_seconds_grow_faster_does_not_overtake():
    found = Speeds(16, None, True, (BatchSpeeds(8, LAWS.solver, LAWS.surrogate),))
    assert found.sentences()[0].endswith("; the surrogate does not overtake: its seconds grow as cells^3, the solver's as cells^2.")
    assert "batch 8" in found.sentences()[0] and "the solver (compiled, at" in found.sentences()[0]
