import csv
import dataclasses
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.small_run import small_evaluation
from ttcfast.evaluation.results import MethodResult, bootstrap_interval, ratio_interval
from ttcfast.evaluation.table import cells, explanation, markdown_table, print_table
from ttcfast.report.outputs import metrics, summary_rows, write_outputs

HORIZONS = (1, 4, 8)


@pytest.fixture(scope="module")
def evaluation():
    return small_evaluation()


def handmade(evaluation, mse: list[float], **options) -> MethodResult:
    """A method with the given mean error at steps 1..8, the same for each problem."""
    values = torch.tensor([[0.0, *mse]] * 5, dtype=torch.float64)
    drift = {q: torch.full((5, 9), 1e-3, dtype=torch.float64) for q in ("mass", "momentum", "energy")}
    return MethodResult("prm", False, 4, values, drift, 2.0, 160, **options)


def test_rows_equal_recomputation_from_raw_results(evaluation):
    rows = summary_rows(evaluation, HORIZONS)
    base = evaluation.baseline.mse[:, 1:].mean(1)
    for row, result in zip(rows, evaluation.results, strict=True):
        assert (row["method"], row["projection"]) == (result.method, result.projected)
        for h in HORIZONS:
            assert row[f"mse_step_{h}"] == pytest.approx(float(result.mse[:, h].sum() / 5))
        ours = result.mse[:, 1:].mean(1)
        gains = 100 * (base - ours) / (base + 1e-12)
        assert row["gain_mean_percent"] == pytest.approx(float(gains.mean()))
        assert row["gain_median_percent"] == pytest.approx(float(gains.quantile(0.5)))
        assert row["gain_improved_percent"] == pytest.approx(100 * float((ours < base).double().mean()))
        assert row["gain_standard_error_percent"] == pytest.approx(float(gains.std() / math.sqrt(5)))
        assert row["drift_mass"] == pytest.approx(float(result.drift["mass"][:, -1].mean()))


def test_intervals_are_those_of_the_percentile_bootstrap(evaluation):
    errors = evaluation.baseline.mse[:, 4].numpy()
    picks = torch.randint(5, (10_000, 5), generator=torch.Generator().manual_seed(0)).numpy()
    expected = np.percentile(errors[picks].mean(1), [2.5, 97.5])
    assert evaluation.baseline.interval_at(4) == pytest.approx(expected.tolist(), rel=1e-12)
    drawn = np.random.default_rng(1).choice(errors, (10_000, 5)).mean(1)
    assert evaluation.baseline.interval_at(4) == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), rel=0.03)
    row = summary_rows(evaluation, HORIZONS)[1]
    assert (row["mse_step_4_low"], row["mse_step_4_high"]) == pytest.approx(expected.tolist()) and row["reward_evaluations"] == 0
    heads, rows = cells(evaluation, HORIZONS)
    assert rows[1][2].startswith(f"{row['mse_step_4']:.3g} [") and rows[1][2].endswith("]")
    heads, rows = cells(evaluation, HORIZONS, narrow=True)
    assert heads[4] == "95 % of\nstep 8" and "[" not in rows[1][2] and rows[1][4].startswith("[")
    assert [rows[0][-1], rows[7][-1]] == ["0", str(evaluation.find("arm").reward_evaluations)] and rows[7][-1] != "0"


def test_a_single_problem_and_a_method_that_blew_up_have_no_interval(evaluation):
    assert math.isnan(bootstrap_interval(torch.tensor([0.5]))[0]) and math.isnan(bootstrap_interval(torch.tensor([0.5, math.inf]))[1])
    assert summary_rows(evaluation.adding(handmade(evaluation, [math.inf] * 8)), HORIZONS)[-1]["mse_step_4_low"] is None
    assert math.isnan(evaluation.baseline.interval_at(9)[0])


def test_only_chosen_rows_are_printed(evaluation):
    text = io.StringIO()
    chosen = [r for r in evaluation.results if r.method == "deterministic" or r.name == "oracle + projection"]
    print_table(evaluation, HORIZONS, None, Console(file=text, width=200), only=chosen)
    lines = [line.strip() for line in text.getvalue().splitlines()]
    assert sum(line.startswith(("deterministic", "+ projection", "oracle + projection")) for line in lines) == 3
    assert not any(line.startswith(("ARM", "persistence")) for line in lines)


def test_gain_that_does_not_beat_the_reference_is_none(evaluation):
    base = evaluation.baseline.mse.mean(0)[1:]
    worse, better = handmade(evaluation, (1.1 * base).tolist()), handmade(evaluation, (1e-4 * base).tolist())
    heads, rows = cells(evaluation.adding(worse, better), HORIZONS)
    column = heads.index("gain %\nmean / median")
    assert rows[-2][column].startswith("none") and "none" not in rows[-1][column]
    assert rows[1][column] == "baseline" and rows[2][column + 2] == "baseline" and rows[0][0] == "persistence"


def test_blown_up_method_is_marked(evaluation):
    lost = handmade(evaluation, [0.1] * 6 + [math.inf, math.nan])
    with_lost = evaluation.adding(lost)
    _, rows = cells(with_lost, (1, 8, 20))
    assert rows[-1][0] == "PRM (5/5 blew up)" and rows[-1][2] == "blew up" and rows[-1][3] == "–"
    row = summary_rows(with_lost, (1, 8, 20))[-1]
    assert row["mse_step_8"] is None and row["gain_mean_percent"] is None and row["blown_up"] == 5
    assert row["gain_improved_percent"] == 0.0


def test_metrics_are_strict_json(evaluation, tmp_path):
    lost = handmade(evaluation, [0.1] * 6 + [math.inf, math.nan])
    write_outputs(tmp_path, evaluation.adding(lost), None, (1, 20), {"config": {}})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    held = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert held["methods"][-1]["mse_by_step"][-1] is None
    assert held["methods"][1]["per_problem"]["rollout_mse"] == pytest.approx(evaluation.baseline.rollout_error.tolist())
    assert held["provenance"] == {"config": {}}
    with open(tmp_path / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and [r["method"] for r in rows[:2]] == ["persistence", "deterministic"] and rows[-1]["mse_step_20"] == ""
    assert float(rows[2]["mse_step_1"]) == pytest.approx(evaluation.results[2].mse_at(1))


def test_metrics_hold_every_step(evaluation):
    held = metrics(evaluation, None, HORIZONS)
    assert held["sweep"] is None and held["problems"] == 5 and len(held["methods"]) == 11
    assert all(len(m["mse_by_step"]) == 9 and len(m["drift_by_step"]["energy"]) == 9 for m in held["methods"])


def test_printed_table_keeps_whole_lines_in_a_narrow_console(evaluation):
    text = io.StringIO()
    print_table(evaluation, HORIZONS, "a title", Console(file=text, width=60))
    lines = text.getvalue().splitlines()
    for name in ("deterministic", "random candidate", "mean of B", "ARM", "oracle"):
        assert any(line.strip().startswith(name) and len(line.split()) > 8 for line in lines), name
    assert sum("+ projection" in line for line in lines) == 5
    assert max(len(line) for line in lines if "random" in line) < 135
    for line in explanation(evaluation, narrow=True):
        assert line in text.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_table_fits_its_terminal_and_cuts_no_number(evaluation, width):
    heads, rows = cells(evaluation, HORIZONS, narrow=True)
    text = io.StringIO()
    print_table(evaluation, HORIZONS, None, Console(file=text, width=width, force_terminal=True, no_color=True))
    printed = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue())
    assert max(map(len, printed.splitlines())) <= width
    assert all(" ".join(line.split()) in " ".join(printed.split()) for line in explanation(evaluation, narrow=True))
    table, _, left_out = printed.split("MSE: mean")[0].partition("Columns left out")
    assert "…" not in table
    assert bool(left_out) == (width < 140)
    for row in rows:
        for head, cell in zip(heads, row):
            if head != "method" and " ".join(head.split()) not in " ".join(left_out.split()):
                assert cell in table, (head, cell)
        assert all(word in table for word in row[0].split())


def test_long_names_wrap_in_a_pipe_of_any_width(evaluation):
    named = evaluation.adding(dataclasses.replace(handmade(evaluation, [0.01] * 8), method="prm_symmetry", projected=True))
    text = io.StringIO()
    print_table(named, (1, 4, 6, 8), None, Console(file=text, width=40))
    table = text.getvalue().split("MSE: mean")[0].split("Columns left out")[0]
    assert max(map(len, table.splitlines())) <= 100 and "0.01" in table and "symmetries" in table


def test_markdown_has_the_same_cells(evaluation):
    heads, rows = cells(evaluation, HORIZONS)
    lines = markdown_table(heads, rows, explanation(evaluation)).splitlines()
    assert lines[0].count("|") == len(heads) + 1
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == rows[0]


def test_the_interval_of_a_ratio_resamples_both_rows_on_the_same_problems():
    theirs = torch.rand(40, generator=torch.Generator().manual_seed(1)).double() + 0.1
    ratio, low, high = ratio_interval(0.5 * theirs, theirs)
    assert ratio == pytest.approx(0.5) and low == pytest.approx(0.5) and high == pytest.approx(0.5)  # paired: no spread
    ours = theirs * torch.rand(40, generator=torch.Generator().manual_seed(2))
    ratio, low, high = ratio_interval(ours, theirs)
    picks = np.random.default_rng(0).integers(0, 40, (20_000, 40))
    found = ours.numpy()[picks].mean(1) / theirs.numpy()[picks].mean(1)
    assert ratio == pytest.approx(float(ours.mean() / theirs.mean()))
    assert [low, high] == pytest.approx(np.quantile(found, [0.025, 0.975]).tolist(), abs=0.01)
    assert math.isnan(ratio_interval(torch.tensor([1.0, math.inf]), theirs[:2])[0])
    alone = ratio_interval(torch.tensor([1.0]), torch.tensor([4.0]))
    assert alone[0] == 0.25 and math.isnan(alone[1])
