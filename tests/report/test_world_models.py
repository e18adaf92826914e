"""The table and the figure of ``ttcfast train_wm``: means, spreads, the order, and what could not be measured."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ttcfast.evaluation.table import markdown_table, print_with_notes, rich_table
from ttcfast.pwm.evaluation.imagination import ImaginationErrors
from ttcfast.pwm.train_wm import ArmResult, Comparison, TrainWMConfig
from ttcfast.report.figures.endpoint_error import endpoint_error
from ttcfast.report.world_models import cells, explanation, order, summary


def run(arm: str, seed: int, last: float, **changes) -> ArmResult:
    errors = ImaginationErrors((0.01, 0.5 * last, last), (0.001, 0.002, 0.003), (0.1, 0.2, 0.3), 0.05, 0.0)
    values = {"steps": 10, "parameters": 1010, "parameter_gap": 0.01, "dynamics_parameters": 500, "dynamics_gap": 0.02}
    values |= {"base_parameters": 1000, "evaluations": 4, "training_evaluations": 200, "seconds": 3.0, "cpu_seconds": 2.0 + seed}
    values |= {"esnr_db": 3.0 + seed, "skipped": 0, "stopped": False}
    return ArmResult(**{**values, "arm": arm, "seed": seed, "errors": errors, **changes})


def comparison(*runs: ArmResult) -> Comparison:
    return Comparison(list(runs), ImaginationErrors((0.02, 0.3, 0.7), (float("nan"), 0.1, 0.2)), 64, (9, 1))


@pytest.fixture
def small() -> Comparison:
    return comparison(*(run("mlp", s, e) for s, e in enumerate((0.4, 0.5))), *(run("heun2", s, e) for s, e in enumerate((0.1, 0.12))))


def test_a_row_is_mean_and_standard_error_over_the_seeds(small):
    still, mlp, heun = summary(small)
    assert still["arm"] == "persistence" and still["observation_error_3"] == 0.7 and still["reward_error_1"] != still["reward_error_1"]
    assert mlp["observation_error_3"] == pytest.approx(0.45) and mlp["observation_error_3_se"] == pytest.approx(0.05)
    assert heun["observation_error_1"] == pytest.approx(0.01) and heun["cpu_seconds"] == 2.5 and heun["parameter_gap_percent"] == 1
    assert mlp["esnr_db"] == 3.5


def test_the_order_says_what_the_seeds_leave_open(small):
    assert order(small) == ["flow, Heun K = 2", "<", "MLP"]
    close = comparison(*(run("mlp", s, e) for s, e in enumerate((0.1, 0.5))), *(run("heun2", s, e) for s, e in enumerate((0.2, 0.3))))
    assert order(small, "reward") == ["MLP", "~", "flow, Heun K = 2"], "equal"
    assert order(close) == ["flow, Heun K = 2", "~", "MLP"]
    assert order(comparison(run("mlp", 0, 0.1), run("heun2", 0, 0.9))) == ["MLP", "~", "flow, Heun K = 2"], "one seed leaves it open"
    broken = comparison(run("mlp", 0, float("nan")), run("mlp", 1, 0.2), run("heun2", 0, 0.9), run("heun2", 1, 0.8))
    assert order(broken) == ["flow, Heun K = 2", "<", "MLP"], "a run that blew up is last"


def test_the_table_reads_well(small):
    heads, rows = cells(small)
    assert all(len(row) == len(heads) for row in rows)
    text = markdown_table(heads, rows, [])
    assert "| MLP | 1,010 (+1.00 %) | 4 | 0.01 ± 0 | 0.45 ± 0.05 |" in text and "| nothing changes | – | 0 | 0.02 | 0.7 |" in text
    shown = io.StringIO()
    print_with_notes(rich_table(heads, rows), explanation(small, TrainWMConfig()), Console(file=shown, width=80))
    assert "flow, Heun K = 2 < MLP" in shown.getvalue() and shown.getvalue().count("0.45 ± 0.05") == 1


def test_a_stopped_run_is_told(small):
    lost = comparison(*small.runs, run("euler1", 0, float("nan"), stopped=True, skipped=20))
    assert "flow, Euler K = 1 (1 stopped)" in markdown_table(*cells(lost), [])
    assert any("skipped 20 updates and stopped 1 runs" in note for note in explanation(lost, TrainWMConfig()))


def test_the_figure_draws_every_arm(small):
    figure = endpoint_error(small)
    left, right = figure.axes
    drawn = {line.get_label(): line for line in left.get_lines()}
    assert drawn["MLP"].get_ydata().tolist() == pytest.approx([0.01, 0.225, 0.45])
    point = next(line for line in right.get_lines() if line.get_label() == "flow, Heun K = 2")
    assert (point.get_xdata()[0], point.get_ydata()[0]) == (2.5, pytest.approx(0.11))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nothing changes", "MLP", "flow, Heun K = 2"]
    assert left.get_xlabel() == "imagined steps" and right.get_xlabel() == "CPU seconds of training"
