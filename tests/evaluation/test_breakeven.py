"""Seconds at equal error and the grid of breakeven, on numbers whose answers are known."""

import dataclasses
import math

import pytest
import torch

from tests.small_run import small_evaluation
from ttcfast.evaluation.breakeven import (
    at_equal_error,
    breakeven_grid,
    equal_error_columns,
    equal_error_notes,
    power_law,
    solver_at_equal_error,
    solver_grids,
)
from ttcfast.evaluation.results import MethodResult
from ttcfast.report.outputs import metrics

GRIDS = (8, 16, 64)
ERRORS, SECONDS = [n**-2.0 for n in GRIDS], [1e-3 * n**3 for n in GRIDS]  # seconds = 1e-3 error^-1.5


@pytest.mark.parametrize("error", [1 / 64, 0.01, 1 / 256, 1e-3, 1 / 4096])
def test_interpolation_is_exact_on_a_power_law(error):
    found = at_equal_error(ERRORS, SECONDS, error)
    assert found.known and found.value == pytest.approx(1e-3 * error**-1.5, rel=1e-9)


def test_beyond_the_measured_grids_there_is_a_bound_alone():
    above, below = at_equal_error(ERRORS, SECONDS, 0.02), at_equal_error(ERRORS, SECONDS, 2e-4)
    assert (above.value, above.place, above.known) == (SECONDS[0], "above all measured", False)
    assert (below.value, below.place, below.known) == (SECONDS[-1], "below all measured", False)
    assert not at_equal_error([0.1], [2.0], 0.2).known and at_equal_error([0.1], [2.0], 0.1).known


def test_where_errors_do_not_fall_with_the_grid_the_least_seconds_count():
    assert at_equal_error([0.1, 0.4, 0.05], [1.0, 2.0, 4.0], 0.2).value == pytest.approx(2.0**0.5)
    assert at_equal_error([0.1, 0.1], [3.0, 5.0], 0.1).value == 3.0


def row(method: str, error: float, seconds: float, **options) -> MethodResult:
    mse = torch.full((5, 9), error, dtype=torch.float64)
    return MethodResult(method, False, 1, mse, {}, seconds, 0, **options)


@pytest.fixture(scope="module")
def evaluation():
    found = small_evaluation()
    made = [row("deterministic", 0.01, 5.0), row("prm", 1e-3, 100.0), row("random", 0.02, 5.0), row("persistence", 1e-3, 0.0)]
    made += [row("prm_solver", 1e-4, 1.0), row("oracle", 1e-4, 1.0), row("finetuned", 5e-4, 1.0, recorded="elsewhere")]
    made += [row(f"solver {n}x{n}", e, s) for n, e, s in zip((64, 8, 16), (ERRORS[2], *ERRORS[:2]), (SECONDS[2], *SECONDS[:2]))]
    made += [row("solver 32x32", 1.0, 1.0, recorded="elsewhere"), row("solver 4x4", math.inf, 1.0)]
    return dataclasses.replace(found, results=tuple(made))


def test_the_grids_are_the_solvers_rows_of_this_run(evaluation):
    assert [(g.cells, g.seconds) for g in solver_grids(evaluation, 8)] == list(zip(GRIDS, SECONDS))


def test_metrics_have_seconds_at_equal_error_and_their_ratio(evaluation):
    held = {m["method"]: m for m in metrics(evaluation, None, (1, 8))["methods"]}
    assert held["deterministic"]["solver_seconds_at_equal_error"] == pytest.approx(1.0)
    assert held["deterministic"]["breakeven"] == pytest.approx(5.0) and held["deterministic"]["equal_error"] == "between measured grids"
    assert held["prm"]["breakeven"] == pytest.approx(100 / (1e-3 * 1e-3**-1.5))
    assert held["solver 16x16"]["breakeven"] == pytest.approx(1.0)
    assert (held["random"]["breakeven"], held["random"]["equal_error"]) == (None, "above all measured")
    assert held["oracle"]["equal_error"] == "below all measured" and held["oracle"]["solver_seconds_at_equal_error"] is None
    for method in ("persistence", "finetuned"):  # neither takes seconds of this run
        assert (held[method]["breakeven"], held[method]["equal_error"]) == (None, None)


def test_the_note_is_on_the_deterministic_rollout_and_the_best_without_a_solver(evaluation):
    (note,) = equal_error_notes(evaluation, (1, 8, 20))
    assert note.startswith("Breakeven at step 8 (the solver's seconds at equal error, interpolated between its grids): deterministic")
    assert note.endswith("grids): deterministic takes 5 s, 5 times the solver's 1 s; PRM takes 100 s, 3.16 times the solver's 31.6 s.")
    assert "interpolated between its grids, not compiled): deterministic" in equal_error_notes(evaluation, (8,), compiled=False)[0]
    better = dataclasses.replace(evaluation, results=tuple(r for r in evaluation.results if r.method != "prm"))
    assert equal_error_notes(better, (8,))[0].count("takes") == 1, "the deterministic rollout is the best itself"


def test_the_note_says_where_there_is_a_bound_alone(evaluation):
    others = [r for r in evaluation.results if r.method not in ("solver 8x8", "prm")]
    (note,) = equal_error_notes(dataclasses.replace(evaluation, results=(*others, row("prm", 1e-4, 131.072))), (8,))
    assert "deterministic takes 5 s, at least 1.22 times the solver's (its error is above those of all grids" in note
    assert "PRM takes 131 s, at most 0.5 times the solver's (its error is below those of all grids" in note


def test_without_a_solver_there_is_nothing_to_say(evaluation):
    alone = dataclasses.replace(evaluation, results=tuple(r for r in evaluation.results if not r.method.startswith("solver ")))
    assert equal_error_notes(alone, (8,)) == [] and solver_at_equal_error(alone, alone.baseline, 8) is None
    assert set(equal_error_columns(alone, alone.baseline, (8,)).values()) == {None}


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_grid_of_breakeven_is_where_the_laws_cross(factor):
    surrogate, solver = {n: 2e-5 * n**2 for n in (32, 64, 128)}, {n: 1e-7 * n**3 for n in (32, 64)}
    found = breakeven_grid(surrogate, solver, factor)
    assert found == pytest.approx(2e-5 / (1e-7 * factor**3), rel=1e-9)
    assert 2e-5 * found**2 == pytest.approx(1e-7 * (factor * found) ** 3)


def test_without_an_upward_crossing_there_is_none():
    cubic, square = {n: 1e-7 * n**3 for n in (32, 64, 128)}, {n: 1e-5 * n**2 for n in (32, 64, 128)}
    assert breakeven_grid(cubic, square, 1.0) is None and breakeven_grid(cubic, cubic, 1.0) is None
    nearly = {n: 2e-7 * n**3.001 for n in (32, 64)}
    assert breakeven_grid({n: 4e-7 * n**3 for n in (32, 64)}, nearly, 1.0) is None, "beyond a billion cells"


def test_a_law_is_the_least_squares_fit():
    a, p = power_law({1: 1.0, 10: 10.0, 100: 1000.0})
    assert (a, p) == (pytest.approx(math.log(10) * -1 / 6), pytest.approx(1.5))


def test_wrong_numbers_are_refused():
    good = {32: 1.0, 64: 2.0}
    with pytest.raises(ValueError, match=r"seconds is \{32: 1.0\}; give positive seconds on two grids"):
        breakeven_grid({32: 1.0}, good, 1.0)
    with pytest.raises(ValueError, match=r"seconds is \{32: 1.0, 64: 0.0\}"):
        breakeven_grid(good, {32: 1.0, 64: 0.0}, 1.0)
    with pytest.raises(ValueError, match=r"equal_error_factor is 0.0; give a positive number"):
        breakeven_grid(good, good, 0.0)
