"""Rows of the classical solver and of its mean with the surrogate."""

import dataclasses
from dataclasses import asdict

import pytest
import torch

from tests.small_run import SPEC, problems, surrogate
from ttcfast.data.generate import KolmogorovFlow
from ttcfast.evaluation import solvers
from ttcfast.evaluation.evaluate import Problems, evaluate_method
from ttcfast.evaluation.methods import BLEND, variants
from ttcfast.evaluation.results import chooses_by_reward
from ttcfast.evaluation.solvers import affordable_results, solver_results
from ttcfast.models.ensemble import SolverStep
from ttcfast.models.grid_solvers import EulerGrids, KolmogorovGrids, StepSolver
from ttcfast.physics import EulerSolver
from ttcfast.physics.navier_stokes import VorticitySolver, random_vorticity, spectral_resampling
from ttcfast.rewards.oracle import OracleScorer
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.projection import project_conservation

PARAMETERS = {"system": "kolmogorov", "kolmogorov": asdict(KolmogorovFlow(viscosity=0.02)), "cfl": 0.5}
FLOW = KolmogorovGrids((16, 16), 0.1, PARAMETERS)
GAS = EulerGrids(SPEC, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))


def turbulence(steps=3):
    solver = VorticitySolver(viscosity=0.02, cfl=0.5)
    truth = spectral_resampling(solver.rollout(random_vorticity(2, 64, seed=0), torch.arange(4) * 0.1), 16)
    return Problems(truth, StateSpec.fields("vorticity", conserved="all"), steps, shown=(1,))


def test_a_finer_grid_is_nearer_to_the_truth():
    (coarse, fine), notes = solver_results(turbulence(), FLOW, (16, 64))
    assert (coarse.method, fine.method, fine.evaluations) == ("solver 16x16", "solver 64x64", 0)
    assert float(fine.rollout_error.mean()) < 0.2 * float(coarse.rollout_error.mean())
    assert fine.mse.shape == (2, 4) and float(fine.mse[:, 0].max()) < 1e-9
    assert fine.trajectory is not None and fine.trajectory.shape == (1, 4, 1, 16, 16)
    assert float(fine.drift["vorticity"].max()) < 1e-5
    assert notes == [solvers.SOLVER_NOTE] and not chooses_by_reward(fine.method)


def test_rows_of_a_gas_are_the_errors_of_its_solver():
    given = problems(3, 4)
    (row,), _ = solver_results(given, GAS, (16,))
    solved = EulerSolver(SPEC, "periodic", 0.7).rollout(given.truth[:, 0], torch.arange(5) * 0.02)
    torch.testing.assert_close(row.mse, given.error(solved), rtol=1e-6, atol=1e-12)
    assert row.final_drift("energy") < 1e-5 and row.seconds > 0


def test_beyond_the_truth_the_solver_goes_on():
    assert solver_results(turbulence(6), FLOW, (16,))[0][0].drift["vorticity"].shape == (2, 7)


def test_a_grid_on_which_it_fails_is_a_note():
    given = problems(2, 2)
    given.truth[:, 0, 3] = 0.0  # no energy: the pressure is negative
    rows, notes = solver_results(given, GAS, (8, 16))
    assert rows == [] and "solver 8x8 is left out: density or pressure is not positive" in notes[1] and len(notes) == 3


@pytest.mark.parametrize("seconds, methods, said", [(0.0, 2, "none of these grids"), (3.5, 2, "solver 16x16"), (13.0, 3, "solver 32x32")])
def test_the_finest_grid_is_the_one_that_takes_no_longer_than_the_surrogate(monkeypatch, seconds, methods, said):
    """Seconds are cells over 64 for a rollout of four steps."""
    measured = solvers._measured

    def timed(given, solver, cells, device):
        return dataclasses.replace(measured(given, solver, cells, device), seconds=cells**2 / 256 * 3 * given.steps / 4)

    monkeypatch.setattr(solvers, "_measured", timed)
    rows, notes = affordable_results(problems(2, 4), GAS, seconds)
    assert [r.method for r in rows] == ["solver 8x8", "solver 16x16", "solver 32x32"][:methods]
    assert said in notes[-1] and f"takes {seconds:.3g} s" in notes[-1]


def blended(fm, given, solver, *, projected=False):
    rows = variants({}, TTCConfig(), spec=given.spec, solver=SolverStep(solver, given.spec))
    return evaluate_method(BLEND, fm, given, rows[BLEND], TTCConfig(), projected=projected)


@pytest.mark.parametrize("projected", [False, True])
def test_the_mean_with_the_surrogate_is_taken_at_every_step(projected):
    gamma = torch.tensor([1.3, 1.5, 1.4])
    spec, fm, given = SPEC.replace(gamma=gamma), surrogate(), problems(3, 3, shown=(0, 1, 2))
    fm.spec, given = spec, dataclasses.replace(given, spec=spec)
    solver = EulerGrids(spec, (16, 16), 0.02, {"cfl": 0.7}, spacing=(1 / 16, 1 / 16))
    found = blended(fm, given, solver, projected=projected)
    x = given.truth[:, 0]
    for t in range(3):
        y = 0.5 * (fm.deterministic(x) + EulerSolver(spec, "periodic", 0.7).rollout(x, [0.02])[:, 0])
        x = project_conservation(x, y, spec)[0] if projected else y
        torch.testing.assert_close(found.trajectory[:, t + 1], x, rtol=1e-5, atol=1e-6)
    assert (found.evaluations, found.solver_steps, found.projected) == (9, 9, projected) and not chooses_by_reward("surrogate_solver")


def test_a_step_of_ones_own_is_a_solver_too():
    given = problems(2, 3)
    mine = StepSolver(lambda x: x.roll(1, -2), (16, 16))
    (row,), _ = solver_results(given, mine, (16,))
    assert row.method == "solver 16x16" and float(row.mse.max()) < 1e-12
    assert float(blended(surrogate(), given, mine).mse[:, 1].max()) > 0


def test_a_reward_chooses_between_surrogate_and_solver_and_blends_them_best():
    given, fm = problems(2, 3), surrogate()
    fm.time_step = 0.05  # which a step of one's own does not contradict
    reward = OracleScorer(given.truth, scale=given.scale, spec=given.spec)
    exact = SolverStep(StepSolver(lambda x: x.roll(1, -2), (16, 16)), given.spec)
    poor = SolverStep(lambda x: 0.5 * x, given.spec)
    for member, chosen in ((exact, 1), (poor, 0)):
        rows = variants({"mine": reward}, TTCConfig(branching_factor=5), spec=given.spec, solver=member)
        found = {
            name: evaluate_method(name, fm, given, rows[name], TTCConfig()) for name in ("mine_solver_choice", "mine_solver_span", BLEND)
        }
        choice, span = found["mine_solver_choice"], found["mine_solver_span"]
        own = evaluate_method("deterministic", fm, given, None, TTCConfig())
        torch.testing.assert_close(choice.mse, torch.zeros_like(own.mse) if chosen else own.mse, rtol=1e-4, atol=1e-9)
        assert bool((span.mse[:, 1] <= choice.mse[:, 1] + 1e-7).all()) and bool((found[BLEND].mse[:, 1] > choice.mse[:, 1]).all())
        assert {(row.evaluations, row.solver_steps) for row in found.values()} == {(6, 6)}
