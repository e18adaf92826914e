"""The calibration figure and its table: exact scores fall from left to right, useless ones do not."""

import csv
import json

import pytest
import torch

from ttcfast.evaluation.calibration import CandidateScores
from ttcfast.report.figures import calibration_figure, calibration_rows
from ttcfast.report.outputs import write_calibration


def groups():
    """Hard and easy states, whose candidates differ by 10 %."""
    generator = torch.Generator().manual_seed(0)
    level = torch.logspace(-3, 0, 40, dtype=torch.float64).reshape(-1, 1)
    errors = level * (1 + 0.1 * torch.rand(40, 8, dtype=torch.float64, generator=generator))
    errors[3, 2] = torch.inf
    return errors, {"prm": -errors, "arm": torch.rand(40, 8, dtype=torch.float64, generator=generator), "state": -level.expand(40, 8)}


def test_the_table_tells_choosing_from_knowing_hard_states():
    errors, scores = groups()
    rows = calibration_rows(scores, errors, bins=4)
    found = {(r["reward"], r["form"]): r["rank_correlation"] for r in rows}
    assert found["prm", "all"] == pytest.approx(-1) and found["prm", "within"] < -0.9
    assert found["state", "all"] < -0.98  # knows which states are hard, and nothing about their candidates
    assert abs(found["arm", "within"]) < 0.2
    exact = [r["error"] for r in rows if (r["reward"], r["form"]) == ("prm", "within")]
    assert exact == sorted(exact, reverse=True) and exact[0] > 1 > exact[-1]
    assert all(sum(r["count"] for r in rows if (r["reward"], r["form"]) == key) == 319 for key in found)
    assert {r["dropped"] for r in rows} == {1}


def test_the_figure_shows_every_reward():
    errors, scores = groups()
    figure = calibration_figure(scores, errors)
    assert len(figure.axes) == 6
    assert [axes.get_lines()[0].get_xdata().shape[0] for axes in figure.axes[:2]] == [10, 8]
    with pytest.raises(ValueError, match="scores is empty"):
        calibration_figure({}, errors)


def test_what_is_written_leaves_out_a_reward_without_a_usable_score(tmp_path):
    errors, scores = groups()
    scores["state"] = torch.full_like(errors, -torch.inf)
    places = (0,) * len(errors)
    assert write_calibration(tmp_path, CandidateScores(errors, scores, places, places)) == [tmp_path / "figures" / "calibration.png"]
    held = json.loads((tmp_path / "calibration.json").read_text())
    assert held["scores"]["state"][0][0] is None and held["errors"][3][2] is None
    rows = list(csv.DictReader((tmp_path / "calibration.csv").open()))
    expected = calibration_rows({name: scores[name] for name in ("prm", "arm")}, errors)
    assert [{k: str(v) for k, v in row.items()} for row in expected] == rows
    assert write_calibration(tmp_path, CandidateScores(errors, {"state": scores["state"]}, places, places)) == []
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["calibration.json"]
