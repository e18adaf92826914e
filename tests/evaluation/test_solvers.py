"""Rows of the classical solver for Kolmogorov flow."""

from dataclasses import asdict

import pytest
import torch

from ttcfast.data.generate import KolmogorovFlow
from ttcfast.evaluation.evaluate import Problems
from ttcfast.evaluation.solvers import check_solvers, solver_results
from ttcfast.physics.navier_stokes import VorticitySolver, random_vorticity, spectral_resampling
from ttcfast.runtime.errors import ArgumentError
from ttcfast.spec import StateSpec

PARAMETERS = {"system": "kolmogorov", "kolmogorov": asdict(KolmogorovFlow(viscosity=0.02)), "cfl": 0.5}


def problems(steps=3):
    solver = VorticitySolver(viscosity=0.02, cfl=0.5)
    truth = spectral_resampling(solver.rollout(random_vorticity(2, 64, seed=0), torch.arange(4) * 0.1), 16)
    return Problems(truth, StateSpec.fields("vorticity", conserved="all"), steps, shown=(1,))


def test_a_finer_grid_is_nearer_to_the_truth():
    coarse, fine = solver_results(problems(), PARAMETERS, 0.1, (16, 64))
    assert (coarse.method, fine.method, fine.evaluations) == ("solver 16x16", "solver 64x64", 0)
    assert float(fine.rollout_error.mean()) < 0.2 * float(coarse.rollout_error.mean())
    assert fine.mse.shape == (2, 4) and float(fine.mse[:, 0].max()) < 1e-9
    assert fine.trajectory is not None and fine.trajectory.shape == (1, 4, 1, 16, 16)
    assert float(fine.drift["vorticity"].max()) < 1e-5


def test_beyond_the_truth_the_solver_goes_on():
    assert solver_results(problems(6), PARAMETERS, 0.1, (16,))[0].drift["vorticity"].shape == (2, 7)


@pytest.mark.parametrize(
    "others, cells, message",
    [
        ({"system": None}, (16,), r"eval.solvers is \[16\], and the data are of system None; there is a solver for 'kolmogorov' here"),
        ({"kolmogorov": asdict(KolmogorovFlow(viscosity=0.1))}, (16,), "the data files are of flows with other parameters"),
        ({}, (16, 15), r"eval.solvers is \[16, 15\]; 15 is no even number of at least 9 cells"),
        ({}, (8,), "8 is no even number of at least 9 cells"),
    ],
)
def test_what_cannot_be_solved_is_refused(others, cells, message):
    check_solvers([PARAMETERS, PARAMETERS], (16, 32))
    with pytest.raises(ArgumentError, match=message):
        check_solvers([PARAMETERS, {**PARAMETERS, **others}], cells)
