"""The short way in: what it gives is what the classes behind it give."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import ttcfast
from tests.small_run import arm, problems, surrogate
from ttcfast.evaluation.evaluate import evaluate
from ttcfast.models.grid_solvers import EulerGrids, StepSolver
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError, DataError
from ttcfast.spec import TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy

AGENT = Path(__file__).resolve().parents[1] / "examples" / "cartpole" / "agent.safetensors"


@pytest.fixture(scope="module")
def start():
    return problems(steps=2).truth[:2, 0]


def test_improve_is_the_greedy_search(start):
    result = ttcfast.improve(surrogate(), start, 2, reward=arm(), branching_factor=3, seed=5)
    expected = TTCGreedy(surrogate(), arm(), TTCConfig(branching_factor=3, seed=5)).rollout(start, 2)
    assert torch.equal(result.trajectory, expected)


@pytest.mark.parametrize(
    ("search", "plain"),
    [
        (ttcfast.Beam(width=2), {"approach": "beam", "beam_width": 2}),
        (ttcfast.Beam(2, lookahead=1), {"approach": "beam", "beam_width": 2, "lookahead": 1}),
        (ttcfast.Beam(2, diverse=True), {"approach": "diverse_beam", "beam_width": 2}),
        (ttcfast.Beam(2, "discounted", 0.5), {"approach": "beam", "beam_width": 2, "score_aggregation": "discounted", "discount": 0.5}),
        (ttcfast.Particles(2, temperature=0.1), {"approach": "particle", "beam_width": 2, "temperature": 0.1}),
        ("beam", {"approach": "beam", "beam_width": 4}),
    ],
)
def test_improve_takes_every_search_over_beams(start, search, plain):
    result = ttcfast.improve(surrogate(), start, 2, reward=arm(), branching_factor=4, search=search)
    expected = TTCBeam(surrogate(), arm(), TTCConfig(branching_factor=4, **plain)).rollout(start, 2)
    assert torch.equal(result.trajectory, expected)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"search": ttcfast.SoftmaxMean(0.1)}, {"select": "softmax_mean", "temperature": 0.1}),
        ({"search": ttcfast.Span()}, {"select": "span"}),
        ({"search": "greedy", "refine": 2}, {"refine_steps": 2}),
        ({"refine": ttcfast.Refine(1, lengths=(1.0,), trust=None)}, {"refine_steps": 1, "refine_lengths": (1.0,), "trust": None}),
        ({}, {}),
    ],
)
def test_search_objects_stand_for_plain_fields(given, plain):
    assert TTCConfig(**given) == TTCConfig(**plain)
    changed = dataclasses.replace(TTCConfig(**given), seed=7)
    assert changed == TTCConfig(**plain, seed=7)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"search": "bem"}, "search is 'bem'; give one of 'greedy', 'beam'"),
        ({"search": ttcfast.Beam}, "ttcfast.Beam\\(width=4\\)"),
        ({"search": ttcfast.Beam(3), "beam_width": 2}, "beam_width is 2 and search is Beam.* sets it to 3; give one of them"),
        ({"search": ttcfast.Beam(0)}, "beam_width is 0"),
        ({"refine": -1}, "refine is -1"),
        ({"refine": 1.5}, "refine is 1.5"),
    ],
)
def test_contradictions_and_unknown_searches_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        TTCConfig(**given)


def test_a_plain_module_is_wrapped(start):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.2))
    spec = surrogate().spec
    result = ttcfast.improve(net, start, 2, spec=spec, reward=lambda x, c: -c.square().mean((1, 2, 3)), branching_factor=3)
    assert result.trajectory.shape == (2, 3, 4, *start.shape[2:])
    with pytest.raises(ValueError, match="spec is None and model is a plain Sequential"):
        ttcfast.improve(net, start, 2)


def test_without_a_reward_conservation_scores(start):
    result = ttcfast.improve(surrogate(), start, 2, branching_factor=3)
    named = ttcfast.improve(surrogate(), start, 2, branching_factor=3, reward=ttcfast.ARMScorer(spec=surrogate().spec))
    assert torch.equal(result.trajectory, named.trajectory)


def test_a_budget_holds(start):
    result = ttcfast.improve(surrogate(), start, 4, reward=arm(), branching_factor=3, budget=ttcfast.Budget(evaluations=12))
    assert result.nfe <= 12 and result.trajectory.shape[1] == 5


def test_unknown_arguments_are_named(start):
    with pytest.raises(TypeError, match=r"unknown arguments branching; .*branching_factor"):
        ttcfast.improve(surrogate(), start, 2, branching=3)


def test_the_shipped_models_load():
    assert type(ttcfast.load("surrogate")).__name__ == "Surrogate"
    assert type(ttcfast.load("prm")).__name__ == "PRMScorer"
    with pytest.raises(CheckpointError, match="does not exist"):
        ttcfast.load("nothing.safetensors")


@pytest.mark.parametrize(("what", "kind"), [("surrogate", "Surrogate"), (AGENT, "PWM")])
def test_a_checkpoint_is_read_once(monkeypatch, what, kind):
    reads, original = [], checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda *given: reads.append(given) or original(*given))
    assert type(ttcfast.load(what)).__name__ == kind and len(reads) == 1


def test_a_shipped_model_without_examples_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ttcfast.front_door.__file__", str(tmp_path / "a" / "b.py"))
    with pytest.raises(ArgumentError, match="run from a checkout"):
        ttcfast.load("surrogate")


def test_evaluate_has_the_rows_of_the_evaluation_behind_it():
    given = problems(steps=2)
    found = ttcfast.evaluate(surrogate(), given, {"mine": arm()}, branching_factor=3, search=ttcfast.Beam(2), refine=1)
    names = [r.method for r in found.rollouts if not r.projected]
    assert names == [*("deterministic", "random", "mean"), "mine", "mine_refined", "mine_beam", "oracle"]
    expected = evaluate(surrogate(), given, {"mine": arm()}, TTCConfig(branching_factor=3))
    for row in expected.results:
        assert torch.equal(row.mse, found.find(row.method, projected=row.projected).mse), row.name
    assert "oracle" in found.table() and "mine refined" in found.table().replace("_", " ")


def test_evaluate_has_the_rows_of_run_ttc_by_their_names():
    given, moves = problems(steps=2), ttcfast.Refine(2, lengths=(1.0,), trust=None)
    turned = {"branching_factor": 8, "stochastic": {"dropout": False, "symmetry": True}}
    named = ["mine_corrector", "symmetry_mean", "mine_symmetry", "mine_span"]
    found = ttcfast.evaluate(surrogate(), given, {"mine": arm()}, refine=moves, methods=named, projection=False)
    assert [r.method for r in found.rollouts] == ["deterministic", *named]
    for name, options in {
        "mine_corrector": {"branching_factor": 1, "refine": moves},
        "symmetry_mean": turned,
        "mine_symmetry": {**turned, "refine": moves},
    }.items():
        rolled = ttcfast.improve(surrogate(), given.truth[:, 0], 2, reward=arm(), search="mean", **options)
        torch.testing.assert_close(found.find(name).mse, given.error(rolled.trajectory), rtol=1e-5, atol=1e-12)
    assert (found.find("mine_corrector").evaluations, found.find("mine_symmetry").evaluations) == (10, 80)


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        (["prm_corrector"], "methods names prm_corrector, which needs the reward prm; there are arm, plain; give rewards="),
        (["plain_symmetry"], "methods names plain_symmetry, which moves states along plain, a reward without moves; set its maximum"),
        (["arm_solver"], "methods names arm_solver, which needs a classical solver; give solver="),
        (["surrogate_solver"], "methods names surrogate_solver, which needs a classical solver"),
        (["solver"], "methods names solver, which needs a classical solver"),
        (["arm_corector"], "methods names arm_corector; here there are deterministic, .*arm_corrector"),
    ],
)
def test_a_row_whose_reward_or_solver_is_missing_is_one_clear_error(methods, says):
    rewards = {"arm": arm(), "plain": lambda x, c: -c.square().mean((1, 2, 3))}
    with pytest.raises(ArgumentError, match=says):
        ttcfast.evaluate(surrogate(), problems(steps=2), rewards, methods=methods)


def test_a_row_of_symmetries_needs_them():
    given = problems(steps=2)
    bare = ttcfast.StateSpec.fields("a", "b", "c", "d")
    model = ttcfast.Surrogate(surrogate().model, bare)
    with pytest.raises(ArgumentError, match="methods names symmetry_mean, which needs symmetries, which the layout does not declare"):
        ttcfast.evaluate(model, dataclasses.replace(given, spec=bare), methods=["symmetry_mean"])


def test_evaluate_reads_trajectory_files():
    found = ttcfast.evaluate(ttcfast.load("surrogate"), "examples", steps=1, count=1, branching_factor=2, projection=False, oracle=False)
    assert [r.method for r in found.rollouts] == ["deterministic", "random", "mean", "arm"] and found.problems == 1


def test_evaluate_says_how_to_wrap_a_model():
    with pytest.raises(TypeError, match=r"model is a Linear; wrap it: ttcfast.Surrogate\(model, spec\)"):
        ttcfast.evaluate(nn.Linear(2, 2), "examples")


def test_the_residual_by_name_is_that_of_the_models_time_step_and_cell(start):
    model = surrogate()
    with pytest.raises(ValueError, match=r"model.time_step, or give EulerResidualScorer"):
        ttcfast.improve(model, start, 1, reward="residual")
    model.time_step = 0.05
    found = ttcfast.improve(model, start, 2, reward="residual", branching_factor=3)
    scorer = ttcfast.EulerResidualScorer(0.05, 1 / 16, spec=model.spec)
    assert torch.equal(found.trajectory, ttcfast.improve(model, start, 2, reward=scorer, branching_factor=3).trajectory)
    evaluated = ttcfast.evaluate(model, problems(steps=2), {"residual": "residual"}, oracle=False)
    assert evaluated.find("residual") is not None


def second():
    """Another surrogate of the same problems, as one of another random seed would be."""
    return surrogate(bias=-0.02, noise=0.08)


def shifted(x):
    return x.roll(1, -2)


def test_improve_takes_ensembles_and_blends(start):
    solver = ttcfast.SolverStep(shifted, surrogate().spec)
    for model in (ttcfast.Ensemble([surrogate(), second()]), ttcfast.Blend([surrogate(), solver], [1, 3])):
        result = ttcfast.improve(model, start, 2, reward=arm(), branching_factor=4)
        assert torch.equal(result.trajectory, TTCGreedy(model, arm(), TTCConfig(branching_factor=4)).rollout(start, 2))
        assert (result.solver_steps > 0) == isinstance(model, ttcfast.Blend)


@pytest.mark.parametrize("kind", [ttcfast.Ensemble, ttcfast.Blend])
def test_evaluate_takes_ensembles_and_blends(kind):
    given, parts = problems(steps=2), [surrogate(), second()]
    given = dataclasses.replace(given, spec=given.spec.replace(periodic=False))  # the data say so, and the models did not know
    found = ttcfast.evaluate(kind(parts), given, branching_factor=4)
    assert found.projected_baseline is None and all(part.spec.periodic is True for part in parts)
    steps = [part.deterministic(given.truth[:, 0]) for part in parts]
    first = steps[0] if kind is ttcfast.Ensemble else sum(steps) / 2
    expected = given.error(torch.stack([given.truth[:, 0], first], 1))
    torch.testing.assert_close(found.baseline.mse[:, :2], expected, rtol=1e-4, atol=1e-9)
    assert found.find("oracle").evaluations == 5 * 2 * (4 if kind is ttcfast.Ensemble else 8)


def test_evaluate_reads_files_for_every_surrogate_of_an_ensemble():
    one, other = (ttcfast.load("surrogate") for _ in range(2))
    options = {"steps": 1, "count": 1, "branching_factor": 2, "projection": False, "oracle": False, "methods": ["mean"]}
    found = ttcfast.evaluate(ttcfast.Ensemble([one, other]), "examples", **options)
    plain = ttcfast.evaluate(one, "examples", **options)
    torch.testing.assert_close(found.baseline.mse, plain.baseline.mse)
    assert torch.equal(found.scale, plain.scale)
    other.spec = other.spec.replace(cell_volume=1.0 / 32**2)
    with pytest.raises(DataError, match="cell volume"):
        ttcfast.evaluate(ttcfast.Ensemble([one, other]), "examples", **options)
    alone = ttcfast.SolverStep(shifted, one.spec)
    with pytest.raises(TypeError, match=r"problems is 'examples' and model a SolverStep, which names no training data; give Problems"):
        ttcfast.evaluate(alone, "examples", **options)


def test_evaluate_has_the_rows_of_a_solver():
    given = problems(steps=2)
    found = ttcfast.evaluate(surrogate(), given, solver=shifted, branching_factor=3, projection=False)
    assert [r.method for r in found.rollouts] == ["deterministic", "solver 16x16", "random", "mean", "arm", "surrogate_solver", "oracle"]
    assert float(found.find("solver 16x16").mse.max()) < 1e-10
    row = found.find("surrogate_solver")
    first = (surrogate().deterministic(given.truth[:, 0]) + shifted(given.truth[:, 0])) / 2
    torch.testing.assert_close(row.mse[:, 1], given.error(torch.stack([given.truth[:, 0], first], 1))[:, 1], rtol=1e-4, atol=1e-9)
    assert (row.evaluations, row.solver_steps) == (10, 10)
    named = ["arm", "arm_solver", "arm_solver_choice", "arm_solver_span"]
    found = ttcfast.evaluate(surrogate(), given, solver=shifted, methods=named, projection=False)
    assert [r.method for r in found.rollouts] == ["deterministic", *named]
    assert [found.find(name).solver_steps for name in named] == [0, 20, 10, 10]  # candidate 0 of 8 under symmetries is drawn by itself
    grid = EulerGrids(given.spec, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))
    found = ttcfast.evaluate(surrogate(), given, solver=grid, methods=["solver"])
    assert [r.method for r in found.rollouts if not r.projected][:3] == ["deterministic", "solver 8x8", "solver 16x16"]


def test_a_solver_and_an_ensemble_go_together():
    given = problems(steps=2)
    model = ttcfast.Ensemble([surrogate(), second()])
    found = ttcfast.evaluate(model, given, solver=shifted, branching_factor=3, methods=["surrogate_solver", "arm_solver_choice"])
    row = found.find("surrogate_solver", projected=True)
    assert (row.evaluations, row.solver_steps) == (10, 10) and found.find("solver 16x16") is None
    assert found.find("arm_solver_choice").solver_steps == 10


@pytest.mark.parametrize(
    ("solver", "error", "says"),
    [
        ("euler", TypeError, r"solver is a str; give a function from states \[M, C, \*S\]"),
        (StepSolver(shifted, (8, 8)), ValueError, "solver is for states of 8 x 8 cells and the problems have 16 x 16"),
        (lambda x: x[:, :2], ValueError, "step returned shape"),
    ],
)
def test_a_solver_that_does_not_fit_is_one_clear_error(solver, error, says):
    with pytest.raises(error, match=says):
        ttcfast.evaluate(surrogate(), problems(steps=2), solver=solver)
