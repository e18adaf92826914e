"""Searches over several beams in ``run_ttc``: their rows, the compute frontier, runs that go on where they were killed."""

import csv
import json

import pytest
import torch

from tests.small_run import SCALE, arm, problems, surrogate, write_examples
from ttcfast.evaluation.frontier import search_of, trace_frontier
from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
from ttcfast.report.figures import error_against_evaluations, save
from ttcfast.rewards.common import ARMScorer
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import ARMWeights, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"), steps=3)


def config(examples, out, **changes):
    ttc = TTCConfig(**{"branching_factor": 3, "beam_width": 2, "approach": "beam", **changes.pop("ttc", {})})
    values = {"checkpoint": str(examples / "surrogate.safetensors"), "data": (str(examples),), "out": str(out), "ttc": ttc}
    fixed = {"problems": 2, "steps": 3, "horizons": (1, 3), "projection": False, "calibration": 0, "solvers": ()}
    return RunTTCConfig(**{**values, **fixed, **changes})


@pytest.mark.usefixtures("figures_undrawn")
def test_a_search_is_a_row_beside_the_greedy_one(examples, tmp_path):
    result = run_ttc(config(examples, tmp_path, frontier=(2, 4), frontier_problems=1), quiet=True)
    names = [r.name for r in result.evaluation.results]
    assert names == [
        "persistence",
        "deterministic",
        "random candidate",
        "mean of B",
        "mean over symmetries",
        "ARM",
        "residual",
        "ARM beam k = 2",
        "oracle",
    ]
    beam, greedy = result.evaluation.find("arm_beam"), result.evaluation.find("arm")
    assert (beam.evaluations, greedy.evaluations) == (2 * (3 + 2 * 6), 2 * 9) and (beam.beam_width, greedy.beam_width) == (2, 1)
    assert "| ARM beam k = 2 |" in (tmp_path / "table.md").read_text()
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert {(r["reward"], r["search"]) for r in rows} >= {("arm", "greedy"), ("oracle", "beam"), ("arm", "particle"), ("arm", "lookahead")}
    assert (tmp_path / "figures" / "frontier.png").is_file()


@pytest.mark.usefixtures("figures_undrawn")
def test_a_search_may_be_run_with_projection_alone_and_with_candidates_of_its_own(examples, tmp_path):
    options = {"projection": None, "search_projected": True, "search_candidates": 2, "methods": ("arm", "arm_beam")}
    rows = run_ttc(config(examples, tmp_path, **options), quiet=True).evaluation
    assert [(r.method, r.projected) for r in rows.rollouts] == [
        ("deterministic", False),
        ("deterministic", True),
        ("arm", True),
        ("arm_beam", True),
    ]
    assert rows.find("arm_beam", projected=True).evaluations == 2 * (2 + 2 * 4)
    open_domain = config(examples, tmp_path, **{**options, "projection": False})
    assert [r.name for r in run_ttc(open_domain, quiet=True).evaluation.results][-1] == "ARM beam k = 2"


@pytest.mark.usefixtures("figures_undrawn")
def test_a_killed_run_goes_on_with_the_same_numbers(examples, tmp_path, monkeypatch):
    whole = run_ttc(config(examples, tmp_path / "whole"), quiet=True)
    inner, calls = ARMScorer.score_group, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) > 4:  # in the second rollout with a reward: ARM takes one call a step
            raise KeyboardInterrupt
        return inner(self, *arguments)

    monkeypatch.setattr(ARMScorer, "score_group", killed)
    with pytest.raises(KeyboardInterrupt):
        run_ttc(config(examples, tmp_path / "run", resume=True), quiet=True)
    kept = sorted(p.parent.name for p in (tmp_path / "run" / "resume").rglob("*.safetensors"))
    calls.clear()
    monkeypatch.setattr(ARMScorer, "score_group", lambda self, *a: calls.append(1) or inner(self, *a))
    resumed = run_ttc(config(examples, tmp_path / "run", resume=True), quiet=True)
    assert kept and kept[0] == "arm" and 0 < len(calls) < 6
    for ours, theirs in zip(resumed.evaluation.results, whole.evaluation.results):
        assert torch.equal(ours.mse, theirs.mse) and ours.evaluations == theirs.evaluations, ours.name
    with pytest.raises(CheckpointError, match=r"resume.arm holds a rollout of another configuration: seed is 9, there 0"):
        run_ttc(config(examples, tmp_path / "run", resume=True, ttc={"seed": 9}), quiet=True)
    with pytest.raises(
        CheckpointError, match=r"configuration: scorer.weights.w_mass is 5.0, there 1.0; give another folder, or resume=fals"
    ):
        run_ttc(config(examples, tmp_path / "run", resume=True, arm=ARMWeights(w_mass=5.0)), quiet=True)


@pytest.mark.parametrize(
    "search", [{"approach": "beam"}, {"approach": "particle"}, {"approach": "greedy", "beam_width": 1, "lookahead": 1}]
)
def test_a_search_does_not_combine_candidates(examples, tmp_path, search):
    message = r"^select is 'span', a combination of candidates, of which a beam has no score; use select='argmax'$"
    with pytest.raises(ValueError, match=message):
        config(examples, tmp_path, ttc={**search, "select": "span"})
    greedy = config(examples, tmp_path, ttc={"approach": "greedy", "beam_width": 1, "select": "span"})
    assert greedy.ttc.select == "span"


def test_a_frontiers_points_are_those_searches(tmp_path):
    given, cfg = problems(2, 3), TTCConfig(branching_factor=2, seed=3)
    frontier = trace_frontier(surrogate(), given, {"arm": arm()}, cfg, (9, 3, 4), oracle=False)
    assert {s: [round(frontier.per_step(r), 2) for r in found] for (_, s), found in frontier.results.items()} == {
        "greedy": [3, 4, 9],
        "lookahead": [pytest.approx(10 / 3, abs=0.01), pytest.approx(20 / 3, abs=0.01)],  # nothing to look at behind the last step
        "beam": [pytest.approx(10 / 3, abs=0.01), 7],  # the first step leaves one state
        "diverse_beam": [pytest.approx(10 / 3, abs=0.01), 7],
        "particle": [4, 9],
    }
    options = search_of("beam", 9)
    assert options == {"approach": "beam", "beam_width": 3, "branching_factor": 3}
    rolled = TTCBeam(surrogate(), arm(), TTCConfig(seed=3, **options)).rollout(given.truth[:, 0], 3)
    wanted = ((rolled[:, 1:] - given.truth[:, 1:]) / SCALE.view(4, 1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(frontier.results["arm", "beam"][1].rollout_error, wanted.double(), rtol=1e-4, atol=0)
    greedy = TTCGreedy(surrogate(), arm(), TTCConfig(seed=3, branching_factor=4)).rollout(given.truth[:, 0], 3)
    wanted = ((greedy[:, 1:] - given.truth[:, 1:]) / SCALE.view(4, 1, 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(frontier.results["arm", "greedy"][1].rollout_error, wanted.double(), rtol=1e-4, atol=0)
    figure = error_against_evaluations(frontier)
    save(figure, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 20_000
    axes = figure.axes
    assert len(axes) == 1 and axes[0].get_title() == "ARM" and len(axes[0].containers) == 5
    assert json.dumps(frontier.rows()[0])
