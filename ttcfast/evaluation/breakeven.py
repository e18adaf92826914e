"""Breakeven: where the surrogate takes less time than the classical solver that is as accurate."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .evaluate import Evaluation
from .results import MethodResult

Place = Literal["between measured grids", "above all measured", "below all measured"]
"""Where an error lies among those of the solver's grids."""


@dataclass(frozen=True)
class EqualError:
    """What the solver needs to be as accurate as a method.

    Args:
        value: Interpolated between neighbouring grids; beyond them a bound: "above all measured" it is at most this, "below" at least.
        place: Where the method's error lies.
    """

    value: float
    place: Place

    @property
    def known(self) -> bool:
        """Whether ``value`` is more than a bound."""
        return self.place == "between measured grids"


@dataclass(frozen=True)
class SolverGrid:
    """Error and seconds of a solver's row on a grid of ``cells`` along the first axis."""

    cells: int
    error: float
    seconds: float


def solver_grids(evaluation: Evaluation, step: int) -> list[SolverGrid]:
    """Return the solver's rows that were measured in this run and have a finite error at ``step``, from the coarsest grid on."""
    found = []
    for result in evaluation.results:
        name, error = re.fullmatch(r"solver (\d+)(x\d+)*", result.method), result.mse_at(step)
        if name is not None and result.recorded is None and 0 < error < math.inf and result.seconds > 0:
            found.append(SolverGrid(int(name[1]), error, result.seconds))
    return sorted(found, key=lambda grid: grid.cells)


def last_horizon(evaluation: Evaluation, horizons: Sequence[int]) -> int:
    """Return the last of ``horizons`` that has a truth; without one, the last step that has."""
    return max((h for h in horizons if h <= evaluation.scored), default=evaluation.scored)


def at_equal_error(errors: Sequence[float], values: Sequence[float], error: float) -> EqualError:
    """Interpolate the values of the solver's grids, its seconds or cells, at an error.

    Between neighbouring grids the logarithms are interpolated linearly; where the error lies between several, the smallest value counts.
    Beyond the measured grids nothing is extrapolated.

    Args:
        errors, values: Of each grid, from the coarsest on; positive.
        error: That of the method; positive.
    """
    found = []
    for (e, v), (f, w) in zip(zip(errors, values), list(zip(errors, values))[1:]):
        if min(e, f) <= error <= max(e, f):
            share = 0.0 if e == f else math.log(error / e) / math.log(f / e)
            found.append(min(v, w) if e == f else v * (w / v) ** share)
    found += [v for e, v in zip(errors, values) if e == error]
    if found:
        return EqualError(min(found), "between measured grids")
    if error > max(errors):
        return EqualError(min(values), "above all measured")
    return EqualError(max(values), "below all measured")


def solver_at_equal_error(evaluation: Evaluation, result: MethodResult, step: int) -> EqualError | None:
    """Return the seconds that the solver needs for the error of a method at ``step``.

    None where there is nothing to compare: no row of a solver, an error that is 0 or not finite, a row of another run, or one that takes
    no time, as persistence.
    """
    grids, error = solver_grids(evaluation, step), result.mse_at(step)
    if not grids or not 0 < error < math.inf or result.recorded is not None or result.seconds <= 0:
        return None
    return at_equal_error([g.error for g in grids], [g.seconds for g in grids], error)


def equal_error_columns(evaluation: Evaluation, result: MethodResult, horizons: Sequence[int]) -> dict[str, Any]:
    """Return the entries of ``metrics.json`` on a method at the last horizon.

    ``solver_seconds_at_equal_error``, None beyond the measured grids; ``breakeven``, the method's seconds over those, below 1 where the
    method is faster; and ``equal_error``, where its error lies among those of the solver's grids.
    """
    found = solver_at_equal_error(evaluation, result, last_horizon(evaluation, horizons))
    seconds = found.value if found is not None and found.known else None
    return {
        "solver_seconds_at_equal_error": seconds,
        "breakeven": None if seconds is None else result.seconds / seconds,
        "equal_error": None if found is None else found.place,
    }


def equal_error_notes(evaluation: Evaluation, horizons: Sequence[int], *, compiled: bool = True) -> list[str]:
    """Return a sentence on the deterministic surrogate and the best row without a solver or a truth; none without rows of a solver.

    Args:
        evaluation, horizons: The table, and the steps of its error columns, of which the last counts.
        compiled: Whether the solver was; the sentence says so if it was not, which makes it slower.
    """
    step = last_horizon(evaluation, horizons)
    best = _best_without_solver(evaluation, step)
    rows = [evaluation.baseline, *([best] if best is not None and best is not evaluation.baseline else [])]
    clauses = [_clause(row, found) for row in rows if (found := solver_at_equal_error(evaluation, row, step)) is not None]
    if not clauses:
        return []
    how = "interpolated between its grids" + ("" if compiled else ", not compiled")
    return [f"Breakeven at step {step} (the solver's seconds at equal error, {how}): {'; '.join(clauses)}."]


def _best_without_solver(evaluation: Evaluation, step: int) -> MethodResult | None:
    fair = [r for r in evaluation.rollouts if not re.search("solver|oracle", r.method) and r.recorded is None]
    return min((r for r in fair if r.mse_at(step) < math.inf), key=lambda r: r.mse_at(step), default=None)


def _clause(result: MethodResult, found: EqualError) -> str:
    took, ratio = f"{result.name} takes {result.seconds:.3g} s", f"{result.seconds / found.value:.3g} times"
    if found.known:
        return f"{took}, {ratio} the solver's {found.value:.3g} s"
    if found.place == "above all measured":
        return (
            f"{took}, at least {ratio} the solver's (its error is above those of all grids measured; the fastest takes {found.value:.3g} s)"
        )
    return f"{took}, at most {ratio} the solver's (its error is below those of all grids measured; the slowest takes {found.value:.3g} s)"


def power_law(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Fit ``seconds = exp(a) * cells ** p`` by least squares of the logarithms; return a and p.

    Raises:
        ValueError: Fewer than two grids, or a number of cells or seconds that is not positive.
    """
    if len(seconds) < 2 or any(not (n > 0 and 0 < s < math.inf) for n, s in seconds.items()):
        raise ValueError(f"seconds is {dict(seconds)}; give positive seconds on two grids or more")
    x, y = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    middle, mean = sum(x) / len(x), sum(y) / len(y)
    p = sum((a - middle) * (b - mean) for a, b in zip(x, y)) / sum((a - middle) ** 2 for a in x)
    return mean - p * middle, p


def breakeven_grid(surrogate_seconds: Mapping[int, float], solver_seconds: Mapping[int, float], equal_error_factor: float) -> float | None:
    """Return the number of cells per axis from which the surrogate is faster than the solver that is as accurate, by fitted power laws.

    Args:
        surrogate_seconds, solver_seconds: Seconds per frame by cells per axis, at one batch size.
        equal_error_factor: Cells per axis of the grid on which the solver is as accurate, over those of the surrogate's.

    Returns:
        None where the solver's seconds do not grow faster with the cells than the surrogate's, so that there is no such number, or where
        it is beyond 10^9 cells, which the fit cannot tell from none.

    Raises:
        ValueError: The factor is not positive, or as ``power_law``.
    """
    if not 0 < equal_error_factor < math.inf:
        raise ValueError(f"equal_error_factor is {equal_error_factor}; give a positive number")
    (a, p), (b, q) = power_law(surrogate_seconds), power_law(solver_seconds)
    if q - p < 1e-9:
        return None
    cells = (a - b - q * math.log(equal_error_factor)) / (q - p)  # the logarithm of where exp(a) n^p = exp(b) (factor n)^q
    return math.exp(cells) if cells < 9 * math.log(10) else None
