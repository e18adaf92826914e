import csv
import io
import json

import pytest
from rich.console import Console

from tests.runtime.test_progress import Terminal
from tests.small_run import arm, problems, surrogate
from ttcfast.evaluation.evaluate import evaluate
from ttcfast.report.compare import CompareConfig, compare
from ttcfast.report.outputs import metrics
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import write_json
from ttcfast.spec import TTCConfig


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, on 3 and on 2 problems."""
    folder = tmp_path_factory.mktemp("runs")
    for name, n in (("a", 3), ("b", 2)):
        evaluation = evaluate(surrogate(), problems(n, 4), {"arm": arm()}, TTCConfig(branching_factor=3))
        write_json(folder / name / "metrics.json", metrics(evaluation, None, [1, 4]))
    return folder


def test_runs_stand_in_one_table(runs, tmp_path):
    shown = io.StringIO()
    rows = compare(CompareConfig((str(runs / "a"), str(runs / "b")), str(tmp_path)), Console(file=shown, width=200))
    held = json.loads((runs / "a" / "metrics.json").read_text())["methods"]
    assert len(rows) == 2 * len(held)
    arm_row = next(row for row in rows if row["method"] == "ARM + projection")
    wanted = next(method for method in held if method["method"] == "arm" and method["projection"])
    assert arm_row["rollout MSE"] == wanted["rollout_mse"] and arm_row["gain %"] == wanted["gain_mean_percent"]
    with open(tmp_path / "report.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "report.md").read_text().count("| ARM + projection |") == 2
    assert "differ in numbers of problems" in shown.getvalue() and "oracle" in shown.getvalue()


def test_a_terminal_shows_how_much_of_the_page_is_made(runs, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    compare(CompareConfig((str(runs / "a"), str(runs / "b")), str(tmp_path)), Console(file=io.StringIO(), width=200))
    assert "report" in terminal.getvalue() and "8/8" in terminal.getvalue()  # four parts of each run


def test_one_run_needs_no_warning(runs, tmp_path):
    shown = io.StringIO()
    compare(CompareConfig((str(runs / "a"),), str(tmp_path)), Console(file=shown, width=200))
    assert "differ" not in shown.getvalue()


def test_a_folder_without_numbers_is_told(tmp_path):
    with pytest.raises(DataError, match=r"is no run: it holds no readable metrics\.json"):
        compare(CompareConfig((str(tmp_path),), str(tmp_path / "out")))
    (tmp_path / "metrics.json").write_text('{"methods": [{}]}')
    with pytest.raises(DataError, match="damaged or of another version"):
        compare(CompareConfig((str(tmp_path),), str(tmp_path / "out")))
    with pytest.raises(ArgumentError, match="runs is empty"):
        CompareConfig(())


@pytest.mark.parametrize(("width", "terminal"), [(80, True), (120, True), (80, False)])
def test_numbers_are_never_cut(runs, tmp_path, width, terminal):
    shown = io.StringIO()
    rows = compare(CompareConfig((str(runs / "a"),), str(tmp_path)), Console(file=shown, width=width, force_terminal=terminal))
    text = shown.getvalue()
    assert "…" not in text
    for row in rows:
        assert f"{row['rollout MSE']:.3g}" in text and str(row["run"]) in text
    for column, cell in (("model evals", str(rows[0]["model evals"])), ("B", None)):
        assert column in text  # as a column, or told where it is
        assert cell is None or cell in text or f"see {tmp_path / 'report.csv'}" in text
    assert ("Left out" in text) <= terminal


def test_a_run_in_a_folder_with_brackets_keeps_its_name(runs, tmp_path):
    for name in ("[old] run", "[/x]", ":smile:"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_bytes((runs / "a" / "metrics.json").read_bytes())
        shown = io.StringIO()
        compare(CompareConfig((str(folder),), str(tmp_path / "out")), Console(file=shown, width=300))
        assert str(folder) in shown.getvalue()
