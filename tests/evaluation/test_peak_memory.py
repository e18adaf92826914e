"""The peak of memory of every row: measured, written, shown and read again."""

import dataclasses
import json

import pytest
import torch

from tests.small_run import SPEC, arm, problems, surrogate
from ttcfast.evaluation import solvers
from ttcfast.evaluation.baselines import Indifferent
from ttcfast.evaluation.evaluate import evaluate
from ttcfast.evaluation.table import PEAK, cells, explanation
from ttcfast.models.grid_solvers import EulerGrids
from ttcfast.report.outputs import write_outputs
from ttcfast.report.page.methods import method_table
from ttcfast.report.recorded import read_recorded, write_recorded
from ttcfast.spec import TTCConfig
from ttcfast.ttc import search
from ttcfast.ttc.memory import reset_peak

CPU, TAKEN = torch.device("cpu"), 200_000_000
measured = pytest.mark.skipif(not reset_peak(CPU), reason="/proc/self/clear_refs cannot be written here: no rollout has a peak of its own")


class Hungry(Indifferent):
    """Holds 200 MB while it scores."""

    def score_group(self, state, candidates, context):
        taken = torch.ones(TAKEN // 4)
        return super().score_group(state, candidates, context) + 0 * taken[0]


@pytest.fixture(scope="module")
def evaluation():
    return evaluate(surrogate(), problems(2, 2), {"hungry": Hungry(2), "arm": arm()}, TTCConfig(branching_factor=2))


@measured
def test_a_row_has_the_memory_of_its_own_rollout_whatever_ran_before(evaluation):
    peaks = {r.method: r.peak_bytes for r in evaluation.results if not r.projected}
    for light in ("deterministic", "random", "mean", "arm", "oracle"):
        assert peaks["hungry"] > peaks[light] + 0.95 * TAKEN, light
    assert peaks["persistence"] is None


@measured
def test_solver_rows_have_it_too():
    solver = EulerGrids(SPEC, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))
    (row,), _ = solvers.solver_results(problems(2, 2), solver, (8,))
    assert row.peak_bytes > 10_000_000


@measured
def test_it_is_written_and_shown_but_in_the_narrow_table(evaluation, tmp_path):
    write_outputs(tmp_path, evaluation, None, (1,), {})
    held = json.loads((tmp_path / "metrics.json").read_text())
    assert [m["peak_bytes"] for m in held["methods"]] == [r.peak_bytes for r in evaluation.results]
    hungry = evaluation.find("hungry")
    assert f",{hungry.peak_bytes}," in (tmp_path / "summary.csv").read_text()
    heads, rows = cells(evaluation, (1,))
    assert heads[-1] == "peak\nMB" and rows[0][-1] == "–"
    assert rows[evaluation.results.index(hungry)][-1] == f"{hungry.peak_bytes / 1e6:.0f}"
    assert "| peak MB |" in (tmp_path / "table.md").read_text() and PEAK in explanation(evaluation)
    assert "peak\nMB" not in cells(evaluation, (1,), narrow=True)[0] and PEAK not in explanation(evaluation, narrow=True)
    assert "peak MB" in method_table(held)


def test_where_the_system_cannot_restart_its_count_a_row_has_none(monkeypatch):
    for module in (search, solvers):
        monkeypatch.setattr(module, "reset_peak", lambda device: False)
    given = problems(2, 2)
    table = evaluate(surrogate(), given, {}, TTCConfig(branching_factor=2), oracle=False)
    solver = EulerGrids(SPEC, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))
    rows = [*table.results, *solvers.solver_results(given, solver, (8,))[0]]
    assert [r.peak_bytes for r in rows] == [None] * len(rows)
    assert {row[-1] for row in cells(table, (1,))[1]} == {"–"}


def test_recorded_rows_keep_what_they_recorded_and_older_files_are_read(evaluation, tmp_path):
    given, path = problems(2, 2), tmp_path / "rows.json"
    row = dataclasses.replace(evaluation.find("hungry"), peak_bytes=123_456_789)
    write_recorded(path, [row], given, {"note": "measured elsewhere"})
    (found,), _ = read_recorded(path, given)
    assert found.peak_bytes == 123_456_789 and cells(evaluation.adding(found), (1,))[1][-1][-1] == "123"
    held = json.loads(path.read_text())
    del held["results"][0]["peak_bytes"]
    path.write_text(json.dumps(held))
    (older,), _ = read_recorded(path, given)
    assert older.peak_bytes is None and torch.equal(older.mse, found.mse)
    assert cells(evaluation.adding(older), (1,))[1][-1][-1] == "–"
