"""Rows of the classical solver on several grids, from the same first frames as all others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from ttcfast.metrics import conservation_drift
from ttcfast.models.grid_solvers import GridSolver
from ttcfast.physics import SolverError
from ttcfast.runtime.errors import ArgumentError
from ttcfast.ttc.memory import peak_bytes, reset_peak

from .evaluate import Evaluation, Problems
from .results import MethodResult

SOLVER_NOTE = "solver n x n: the classical solver of the data's equations, from frame 0, on a grid of n x n cells."
FINEST = 16
"""Largest factor by which a grid is refined in search of the finest that is fast enough."""


def solver_results(
    problems: Problems, solver: GridSolver, cells: Sequence[int], *, device: torch.device | None = None
) -> tuple[list[MethodResult], list[str]]:
    """Solve from the first frames of the truth on several grids and measure it as the methods are.

    Args:
        problems: The truth and the steps to roll out.
        solver: The solver (``grid_solvers.solver_of``), or ``StepSolver(step, shape)`` around a function of one's own.
        cells: Cells along the first axis of each solution.
        device: Where to solve; None solves where the truth lies.

    Returns:
        A row per grid, and notes on what they are; a grid on which the solver fails has a note instead of a row.
    """
    solver.check(cells)
    found, notes = [], [SOLVER_NOTE + _speed(solver)]
    for n in cells:
        try:
            found.append(_measured(problems, solver, n, device))
        except SolverError as error:
            notes.append(f"{solver.name(n)} is left out: {error}.")
    return found, notes


def affordable_results(
    problems: Problems, solver: GridSolver, seconds: float, *, device: torch.device | None = None
) -> tuple[list[MethodResult], list[str]]:
    """Return rows on the model's grid, on one of half as many cells per axis, and on the finest grid that takes no longer than ``seconds``.

    The finest is found by doubling the cells: a grid is solved whole if its first frame promises to be fast enough, and kept if it is.

    Args:
        problems, solver, device: As in ``solver_results``.
        seconds: Time that the deterministic surrogate takes on the same problems.
    """
    n = solver.shape[0]
    found, notes = solver_results(problems, solver, [m for m in (n // 2, n) if _takes(solver, m)], device=device)
    fast = [r for r in found if r.seconds <= seconds]
    cells, first = n, dataclasses.replace(problems, steps=1, shown=())
    try:
        while fast and fast[-1].method == solver.name(cells) and cells < FINEST * n and _takes(solver, 2 * cells):
            cells *= 2
            if _measured(first, solver, cells, device).seconds * problems.steps <= 1.2 * seconds:
                row = _measured(problems, solver, cells, device)
                fast += [row] if row.seconds <= seconds else []
    except SolverError as error:
        notes.append(f"{solver.name(cells)} is left out: {error}.")
    known = [r.method for r in found]
    found += [r for r in fast[-1:] if r.method not in known]
    which = f"the finest grid that takes no longer: {fast[-1].method}" if fast else "none of these grids takes no longer"
    return found, [*notes, f"The deterministic surrogate takes {seconds:.3g} s; {which}."]


def with_solver_rows(
    evaluation: Evaluation,
    problems: Problems,
    solver: GridSolver,
    cells: Sequence[int] | None = None,
    *,
    device: torch.device | None = None,
) -> Evaluation:
    """Return an evaluation with the solver's rows below its deterministic rollout.

    Args:
        evaluation: The table of these problems.
        problems, solver, device: As in ``solver_results``.
        cells: Cells along the first axis of each solution; None takes those of ``affordable_results``.
    """
    if cells is None:
        rows, notes = affordable_results(problems, solver, evaluation.baseline.seconds, device=device)
    else:
        rows, notes = solver_results(problems, solver, cells, device=device)
    return evaluation.adding(*rows, notes=notes, after="deterministic")


def _takes(solver: GridSolver, cells: int) -> bool:
    try:
        solver.check([cells])
    except ArgumentError:
        return False
    return True


def _speed(solver: GridSolver) -> str:
    return " Its seconds are those after compilation." if solver.compiled else ""


def _measured(problems: Problems, solver: GridSolver, cells: int, device: torch.device | None) -> MethodResult:
    x0 = problems.truth[:, 0].to(device or problems.truth.device)
    if solver.compiled:
        solver.advance(x0, torch.tensor([1e-6 * solver.time_step]), cells)
    own_peak = reset_peak(x0.device)
    began = time.perf_counter()
    trajectory = solver.rollout(x0, problems.steps, cells).cpu()
    seconds = time.perf_counter() - began
    peak = peak_bytes(x0.device) if own_peak else None
    return MethodResult(
        method=solver.name(cells),
        projected=False,
        branching_factor=1,
        mse=problems.error(trajectory[:, : problems.scored + 1]),
        drift=conservation_drift(trajectory, problems.spec),
        seconds=seconds,
        variances=problems.variances(trajectory),
        evaluations=0,
        peak_bytes=peak,
        trajectory=trajectory[list(problems.shown)] if problems.shown else None,
    )
