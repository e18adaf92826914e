"""Rows of the classical solver on the model's grid and on finer ones, from frame 0."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttcfast.metrics import conservation_drift, rollout_mse
from ttcfast.physics.navier_stokes import VorticitySolver, spectral_resampling

from .evaluate import Problems
from .results import MethodResult

SYSTEM = "kolmogorov"
SOLVER_NOTE = "solver n x n: the classical solver of the data's equations, from frame 0, on a grid of n x n cells."


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
        ValueError: The data are of another system.
    """
    if parameters.get("system") != SYSTEM:
        raise ValueError(f"the data are of system {parameters.get('system')!r}; there is a solver for {SYSTEM!r} here")
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
        known = problems.truth[:, : problems.scored + 1]
        found.append(
            MethodResult(
                method=f"solver {n}x{n}",
                projected=False,
                branching_factor=1,
                mse=rollout_mse(trajectory[:, : problems.scored + 1], known, scale=problems.scale, ndim=2),
                drift=conservation_drift(trajectory, problems.spec),
                seconds=seconds,
                evaluations=0,
                trajectory=trajectory[list(problems.shown)] if problems.shown else None,
            )
        )
    return found
