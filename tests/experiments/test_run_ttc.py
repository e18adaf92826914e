"""Rows of the classical solver in ``run_ttc``, and what they are compared by."""

import json

import pytest
import torch

from tests.small_run import write_examples
from ttcfast.evaluation import speeds
from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
from ttcfast.report.compare import CompareConfig, compare
from ttcfast.runtime.errors import ArgumentError
from ttcfast.spec import TTCConfig

pytestmark = pytest.mark.usefixtures("figures_undrawn")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("examples"), steps=2)


def rows(examples, out, step=None, **changes):
    where = {"checkpoint": str(examples / "surrogate.safetensors"), "data": (str(examples),), "out": str(out)}
    options = {"problems": 2, "steps": 2, "ttc": TTCConfig(branching_factor=2), "horizons": (1, 2), "calibration": 0, "projection": False}
    return run_ttc(RunTTCConfig(**{**where, **options, **changes}), step=step, quiet=True).evaluation


def test_solver_rows_stand_below_the_deterministic_rollout_and_the_mean_below_the_rewards(examples, tmp_path):
    found = rows(examples, tmp_path)
    names = [r.method for r in found.results if r.method not in ("solver 32x32", "solver 64x64")]  # if there is time for them
    used = ["random", "mean", "symmetry_mean", "arm", "residual", "surrogate_solver", "oracle"]
    assert names == ["persistence", "deterministic", "solver 8x8", "solver 16x16", *used]
    assert any("from frame 0" in note for note in found.notes) and any("surrogate takes" in note for note in found.notes)


def test_solver_rows_are_run_where_they_are_named_or_grids_are(examples, tmp_path):
    assert [r.method for r in rows(examples, tmp_path, methods=("arm",)).results] == ["persistence", "deterministic", "arm"]
    named = rows(examples, tmp_path, methods=("surrogate_solver",)).results
    assert [r.method for r in named] == ["persistence", "deterministic", "surrogate_solver"]
    grids = rows(examples, tmp_path, methods=("arm",), solvers=(8, 32)).results
    assert [r.method for r in grids] == ["persistence", "deterministic", "solver 8x8", "solver 32x32", "arm"]
    assert not any("solver" in r.method for r in rows(examples, tmp_path, solvers=()).results)


def test_a_step_of_ones_own_takes_the_place_of_the_solver(examples, tmp_path):
    found = rows(examples, tmp_path, step=lambda x: torch.roll(x, 1, -2), methods=("solver",))
    assert float(found.find("solver 16x16").mse.max()) < 1e-10
    with pytest.raises(ArgumentError, match=r"eval.solvers is \[8\]; a step of one's own"):
        rows(examples, tmp_path, step=torch.clone, solvers=(8,))


def test_grids_that_no_solver_takes_are_refused_before_anything_runs(examples, tmp_path):
    with pytest.raises(ArgumentError, match=r"eval.solvers is \[10\]; a grid of 10 cells neither divides the 16"):
        rows(examples, tmp_path, solvers=(10,))
    with pytest.raises(ValueError, match="solvers is 'all'; it must be one of 'auto'"):
        rows(examples, tmp_path, solvers="all")


def test_seconds_are_compared_at_equal_error_and_over_grids_and_batches(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "LEAST", 0.0)
    out = tmp_path / "run"
    found = rows(examples, out, methods=("solver", "arm"), solvers=(8, 16), breakeven=(1, 3))
    held = json.loads((out / "metrics.json").read_text())
    equal = {m["method"]: m["solver_seconds_at_equal_error"] for m in held["methods"]}
    assert equal["solver 16x16"] == pytest.approx(found.find("solver 16x16").seconds)
    (note,) = (note for note in found.notes if note.startswith("Breakeven at step 2 (the solver's"))
    assert "not compiled): deterministic takes" in note, "so few frames of so small a grid"
    timed = json.loads((out / "breakeven.json").read_text())
    assert (timed["cells"], [each["batch"] for each in timed["batches"]]) == (16, [1, 3])
    for each in timed["batches"]:
        for kind in ("surrogate", "solver"):
            assert list(each[f"{kind}_seconds"]) == ["8", "16", "32"] and min(each[f"{kind}_seconds"].values()) > 0
        note = next(note for note in timed["notes"] if note.startswith(f"Breakeven at batch {each['batch']}:"))
        assert note in found.notes and ("does not overtake" in note) == (each["breakeven_cells"] is None)
    compare(CompareConfig(runs=(str(out),), out=str(tmp_path / "report")))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Seconds per problem and frame, on the same grid" in page and "peak MB" in page
    rows(examples, out, methods=("arm",))
    assert not (out / "breakeven.json").exists()


def test_breakeven_asks_for_a_solver(examples, tmp_path):
    with pytest.raises(ValueError, match=r"breakeven is \[1\] and solvers is empty; give eval.solvers=auto"):
        rows(examples, tmp_path, solvers=(), breakeven=(1,))
    with pytest.raises(ValueError, match="breakeven is 0"):
        rows(examples, tmp_path, breakeven=(0,))
