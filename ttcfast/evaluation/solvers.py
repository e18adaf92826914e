"""Rows of the classical solver on the model's grid and on finer ones, from frame 0."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttcfast.metrics import conservation_drift
from ttcfast.physics.navier_stokes import VorticitySolver, spectral_resampling
from ttcfast.runtime.errors import ArgumentError

from .evaluate import Problems
from .results import MethodResult

SYSTEM = "kolmogorov"
SOLVER_NOTE = "solver n x n: the classical solver of the data's equations, from frame 0, on a grid of n x n cells."


def check_solvers(stored: Sequence[Mapping[str, Any]], cells: Sequence[int]) -> None:
    """Raise ``ArgumentError`` unless all data files, by their stored parameters, are of one flow that can be solved on these grids."""
    said = f"eval.solvers is {list(cells)}"
    if other := [parameters.get("system") for parameters in stored if parameters.get("system") != SYSTEM]:
        raise ArgumentError(f"{said}, and the data are of system {other[0]!r}; there is a solver for {SYSTEM!r} here")
    flows = [{**parameters["kolmogorov"], "spin_up": None} for parameters in stored]
    if any(flow != flows[0] for flow in flows):
        raise ArgumentError(f"{said}, and the data files are of flows with other parameters; run each by itself")
    least = max(8, 2 * flows[0]["wave_number"] + 1)
    if wrong := [n for n in cells if n % 2 or n < least]:
        raise ArgumentError(f"{said}; {wrong[0]} is no even number of at least {least} cells")


def solver_results(
    problems: Problems, parameters: Mapping[str, Any], time_step: float | None, cells: Sequence[int] = (32, 64)
) -> list[MethodResult]:
    """Solve Kolmogorov flow from the first frames of the truth on several grids and measure it as the methods are.

    A finer grid starts from the waves that the frame holds, as a user of the solver would, who has no other data.

    Args:
        problems: Vorticity ``[N, K+1, 1, n, n]`` and the steps to roll out.
        parameters: Settings that ``ttcfast generate system=kolmogorov`` stored with the data.
        time_step: Time between frames.
        cells: Cells per axis of each solution.

    Raises:
        ValueError: There is no time step.
    """
    if time_step is None:
        raise ValueError("time_step is None; a solver needs the time between frames")
    flow = {name: value for name, value in parameters["kolmogorov"].items() if name != "spin_up"}
    solver = VorticitySolver(**flow, cfl=parameters["cfl"])
    times = torch.arange(problems.steps + 1) * time_step
    found = []
    for n in cells:
        began = time.perf_counter()
        solved = solver.rollout(spectral_resampling(problems.truth[:, 0], n), times)
        seconds = time.perf_counter() - began
        trajectory: Tensor = spectral_resampling(solved, problems.truth.shape[-1])
        found.append(
            MethodResult(
                method=f"solver {n}x{n}",
                projected=False,
                branching_factor=1,
                mse=problems.error(trajectory[:, : problems.scored + 1]),
                drift=conservation_drift(trajectory, problems.spec),
                seconds=seconds,
                evaluations=0,
                trajectory=trajectory[list(problems.shown)] if problems.shown else None,
            )
        )
    return found
