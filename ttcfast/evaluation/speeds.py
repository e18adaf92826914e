"""Seconds per frame of the surrogate and the classical solver on several grids and batch sizes, and where they break even."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ttcfast.core.base_fm import Surrogate
from ttcfast.models.grid_solvers import GridSolver
from ttcfast.models.on_grid import on_other_grid
from ttcfast.physics import SolverError
from ttcfast.runtime.errors import ArgumentError

from .breakeven import EqualError, at_equal_error, breakeven_grid, last_horizon, power_law, solver_grids
from .evaluate import Evaluation, Problems

LEAST, MOST = 0.2, 2.0
"""Calls are timed until there are three and they took the first many seconds together, or until they took the second."""
FRAMES = 36
"""Frames on the model's own grid that take about as long as a solver's timed ones, for each state of a batch: four on every grid in 2-D."""


@dataclass(frozen=True)
class BatchSpeeds:
    """Seconds per problem and frame at one batch size, by cells along the first axis."""

    batch: int
    surrogate: dict[int, float]
    solver: dict[int, float]


@dataclass(frozen=True, eq=False)
class Speeds:
    """Seconds per frame of surrogate and solver.

    Args:
        cells: Cells along the first axis of the model's own grid.
        equal: Cells of the grid on which the solver is as accurate as the surrogate on its own; None where the table has no solver.
        compiled: Whether the solver was compiled.
        batches: One per batch size.
        notes: What was left out.
    """

    cells: int
    equal: EqualError | None
    compiled: bool
    batches: tuple[BatchSpeeds, ...]
    notes: tuple[str, ...] = ()

    @property
    def factor(self) -> float:
        """Cells of the solver's grid of equal error over those of the surrogate's; 1 where it is not known."""
        return 1.0 if self.equal is None else self.equal.value / self.cells

    def breakeven(self, speeds: BatchSpeeds) -> float | None:
        """Return ``breakeven_grid`` of a batch size; None, too, where one of both was timed on a single grid."""
        if min(len(speeds.surrogate), len(speeds.solver)) < 2:
            return None
        return breakeven_grid(speeds.surrogate, speeds.solver, self.factor)

    def record(self) -> dict[str, Any]:
        """Return plain values for ``breakeven.json``."""
        return {
            "cells": self.cells,
            "equal_error_factor": self.factor,
            "equal_error": None if self.equal is None else self.equal.place,
            "solver_compiled": self.compiled,
            "seconds_per": "problem and frame",
            "batches": [
                {
                    "batch": each.batch,
                    "surrogate_seconds": each.surrogate,
                    "solver_seconds": each.solver,
                    "surrogate_exponent": _exponent(each.surrogate),
                    "solver_exponent": _exponent(each.solver),
                    "breakeven_cells": self.breakeven(each),
                }
                for each in self.batches
            ],
            "notes": [*self.sentences(), *self.notes],
        }

    def sentences(self) -> list[str]:
        """Return what was found at each batch size, in words."""
        return [self._sentence(each) for each in self.batches]

    def _sentence(self, speeds: BatchSpeeds) -> str:
        about = f"{'compiled' if self.compiled else 'not compiled'}, at equal error on {self._equal_grid()}"
        return (
            f"Breakeven at batch {speeds.batch}: a frame of a problem takes the deterministic surrogate {_listed(speeds.surrogate)} and "
            f"the solver ({about}) {_listed(speeds.solver)}; {self._verdict(speeds)}."
        )

    def _equal_grid(self) -> str:
        if self.equal is None:
            return "the same grid, since the table has no row of a solver"
        bound = {"above all measured": "at most ", "below all measured": "at least "}.get(self.equal.place, "")
        return f"{bound}{self.factor:.3g} times the cells per axis"

    def _verdict(self, speeds: BatchSpeeds) -> str:
        if min(len(speeds.surrogate), len(speeds.solver)) < 2:
            return "one grid says nothing of others"
        cells, (p, q) = self.breakeven(speeds), (power_law(s)[1] for s in (speeds.surrogate, speeds.solver))
        if cells is None:
            return f"the surrogate does not overtake: its seconds grow as cells^{p:.2g}, the solver's as cells^{q:.2g}"
        place = "" if self.equal is None else self.equal.place
        bound = {"above all measured": "at least ", "below all measured": "at most "}.get(place, "about ")
        measured = sorted(speeds.surrogate)
        beyond = "" if measured[0] <= cells <= measured[-1] else f", extrapolated from {measured[0]} to {measured[-1]}"
        return f"the surrogate is faster than the solver of equal error from {bound}{cells:.3g} cells per axis on{beyond}"


def grid_of_equal_error(evaluation: Evaluation, horizons: Sequence[int]) -> EqualError | None:
    """Return the cells per axis on which the solver is as accurate as the deterministic surrogate at the last horizon."""
    step = last_horizon(evaluation, horizons)
    grids, error = solver_grids(evaluation, step), evaluation.baseline.mse_at(step)
    if not grids or not 0 < error < float("inf"):
        return None
    return at_equal_error([g.error for g in grids], [float(g.cells) for g in grids], error)


def measure_speeds(
    surrogate: Surrogate, problems: Problems, solver: GridSolver, batches: Sequence[int], equal: EqualError | None = None
) -> Speeds:
    """Time one frame of the deterministic surrogate and of the solver from the problems' first frames, after a call that is not timed.

    They are timed on the model's own grid, on half and on twice as many cells per axis: the solver as in its rows, the surrogate on block
    averages and on cells divided, a ViT or FNO of ours with its weights on the other grid. A grid that one of both refuses is left out
    with a note.

    Args:
        surrogate: The model, on the device to run on.
        problems: The problems, repeated in turn where a batch is larger.
        solver: The solver.
        batches: Batch sizes.
        equal: ``grid_of_equal_error``.
    """
    device = next((p.device for p in surrogate.parameters()), torch.device("cpu"))
    notes: dict[str, None] = {}
    found = tuple(_batch(surrogate, problems, solver, batch, device, notes) for batch in batches)
    return Speeds(solver.shape[0], equal, solver.compiled, found, tuple(notes))


def _batch(
    surrogate: Surrogate, problems: Problems, solver: GridSolver, batch: int, device: torch.device, notes: dict[str, None]
) -> BatchSpeeds:
    ids = torch.arange(batch) % len(problems.truth)
    x, window = problems.truth[ids, 0].to(device), problems.window(0, surrogate.history)[ids].to(device)
    found, own = BatchSpeeds(batch, {}, {}), solver.shape[0]
    ids = ids.to(device)
    for cells in (own // 2, own, 2 * own):
        try:
            found.surrogate[cells] = _seconds(_surrogate_step(surrogate, window, ids, solver.shape, cells), device) / batch
        except (ValueError, RuntimeError) as error:  # a foreign model refuses a grid in any words
            notes[f"Breakeven without the surrogate on {_times(solver.shape, cells)} cells: {_first_line(error)}."] = None
        try:
            solver.check([cells])
            found.solver[cells] = _seconds(_solver_step(solver, x, ids, cells), device) / batch
        except (ArgumentError, SolverError) as error:
            notes[f"Breakeven without the {solver.name(cells)}: {_first_line(error)}."] = None
    return found


def _surrogate_step(surrogate: Surrogate, window: Tensor, ids: Tensor, shape: Sequence[int], cells: int) -> Callable[[], Any]:
    if any(n * cells % shape[0] for n in shape):
        raise ValueError(f"{cells} cells do not divide the {shape[0]} of the data")
    seen = window
    for axis in range(window.ndim - len(shape), window.ndim):
        factor = max(cells, shape[0]) // min(cells, shape[0])
        if cells >= shape[0]:
            seen = seen.repeat_interleave(factor, axis)
        else:
            seen = seen.unflatten(axis, (-1, factor)).mean(axis + 1)
    model = on_other_grid(surrogate, tuple(n * cells // shape[0] for n in shape))
    return lambda: model.deterministic(seen, problem_ids=ids)


def _solver_step(solver: GridSolver, x: Tensor, ids: Tensor, cells: int) -> Callable[[], Any]:
    if cells == solver.shape[0]:
        return lambda: solver.step(x, ids)
    times = torch.tensor([solver.time_step])
    return lambda: solver.advance(x, times, cells, ids)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of several calls, after one that compiles and fills caches."""
    spent: list[float] = []
    _wait(call, device)
    while len(spent) < 3 or sum(spent) < LEAST:
        began = time.perf_counter()
        _wait(call, device)
        spent.append(time.perf_counter() - began)
        if sum(spent) > MOST:
            break
    return median(spent)


def _wait(call: Callable[[], Any], device: torch.device) -> None:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _exponent(seconds: dict[int, float]) -> float | None:
    return power_law(seconds)[1] if len(seconds) > 1 else None


def _listed(seconds: dict[int, float]) -> str:
    if not seconds:
        return "no measured time"
    return ", ".join(f"{s:.3g} s" for s in seconds.values()) + " on " + ", ".join(map(str, seconds)) + " cells per axis"


def _times(shape: Sequence[int], cells: int) -> str:
    return " x ".join(str(n * cells // shape[0]) for n in shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
