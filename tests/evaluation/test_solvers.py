"""Rows of the classical solver for Kolmogorov flow."""

from dataclasses import asdict

import pytest
import torch

from ttcfast.data.generate import KolmogorovFlow
from ttcfast.evaluation.evaluate import Problems
from ttcfast.evaluation.solvers import solver_results
from ttcfast.physics.navier_stokes import VorticitySolver, random_vorticity, spectral_resampling
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


def test_data_of_another_system_are_refused():
    with pytest.raises(ValueError, match="the data are of system None; there is a solver for 'kolmogorov' here"):
        solver_results(problems(), {}, 0.1)
