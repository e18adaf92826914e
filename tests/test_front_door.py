"""The short way in: what it gives is what the classes behind it give."""

import dataclasses

import pytest
import torch
from torch import nn

import ttcfast
from tests.small_run import arm, problems, surrogate
from ttcfast.evaluation.evaluate import evaluate
from ttcfast.runtime.errors import ArgumentError, CheckpointError
from ttcfast.spec import TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy


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
