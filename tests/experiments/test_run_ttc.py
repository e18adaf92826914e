"""Rows of the classical solver in ``run_ttc``."""

import pytest
import torch

from tests.small_run import write_examples
from ttcfast.experiments.run_ttc import RunTTCConfig, run_ttc
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
