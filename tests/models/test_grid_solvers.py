"""Classical solvers on the model's grid, coarser and finer ones."""

from dataclasses import asdict, replace

import pytest
import torch

from ttcfast.data import GenerateConfig, generate, open_trajectories
from ttcfast.data.generate import KolmogorovFlow, block_average
from ttcfast.models.grid_solvers import EulerGrids, KolmogorovGrids, StepSolver, solver_of
from ttcfast.physics import EulerSolver, initial_conditions
from ttcfast.runtime.errors import ArgumentError
from ttcfast.spec import EulerSpec, StateSpec

SPEC = StateSpec.euler2d(cell_volume=1 / 16**2)
PARAMETERS = {"system": "kolmogorov", "kolmogorov": asdict(KolmogorovFlow(viscosity=0.02)), "cfl": 0.5}


def gas(n=2, cells=16, gamma=1.4):
    return initial_conditions.riemann4(n, (cells, cells), seed=0, first=0, gamma=gamma).float()


def grids(spec=SPEC, **changes):
    return EulerGrids(spec, (16, 16), 0.05, {"cfl": 0.7, "boundary": "periodic", **changes}, spacing=(1 / 16, 1 / 16))


def test_on_the_models_grid_it_is_the_generators_solver():
    times = torch.arange(4) * 0.05
    expected = EulerSolver(SPEC, "periodic", 0.7).rollout(gas(), times)
    assert torch.equal(grids().rollout(gas(), 3, 16), expected)
    torch.testing.assert_close(grids().step(gas()), expected[:, 1], rtol=0, atol=0)


def test_a_coarser_grid_starts_from_block_averages_and_comes_back_with_the_same_averages():
    expected = EulerSolver(SPEC, "periodic", 0.7).rollout(block_average(gas(), 2), torch.arange(4) * 0.05)
    found = grids().rollout(gas(), 3, 8)
    assert found.shape == (2, 4, 4, 16, 16)
    torch.testing.assert_close(block_average(found, 2), expected, rtol=1e-5, atol=1e-6)
    assert (found - expected.repeat_interleave(2, -1).repeat_interleave(2, -2)).abs().max() > 0.01, "cells are filled along slopes"


def test_a_finer_grid_keeps_the_totals_and_a_linear_field_is_filled_exactly():
    found = grids().rollout(gas(), 2, 32)
    torch.testing.assert_close(found.sum((-1, -2)), gas().sum((-1, -2)).unsqueeze(1).expand(-1, 3, -1), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found[:, 0], gas(), rtol=1e-5, atol=1e-6)
    x = torch.arange(16.0).reshape(16, 1) + 2 * torch.arange(16.0)
    solver = EulerGrids(SPEC.replace(periodic=False), (16, 16), 0.05, {}, spacing=(1.0, 1.0))
    fine = solver._resampled(x.expand(1, 1, 4, 16, 16), 32)[0, 0, 0]
    places = (torch.arange(32) - 0.5) / 2
    torch.testing.assert_close(fine[2:-2, 2:-2], (places.reshape(-1, 1) + 2 * places)[2:-2, 2:-2])
    assert solver.boundary == ("outflow", "outflow") and EulerGrids(
        SPEC.replace(periodic=False, closed=True), (16, 16), 0.05, {}, spacing=(1.0, 1.0)
    ).boundary == ("reflecting", "reflecting")


def test_every_problem_has_its_own_gamma_and_the_layout_may_be_another():
    gamma = torch.tensor([1.3, 1.667])
    both = grids(SPEC.replace(gamma=gamma))
    for i, one in enumerate(gamma.tolist()):
        alone = grids(SPEC.replace(gamma=one)).rollout(gas()[i : i + 1], 2, 16)
        torch.testing.assert_close(both.rollout(gas(), 2, 16)[i : i + 1], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(both.step(gas()[i : i + 1], torch.tensor([i])), alone[:, 1], rtol=1e-5, atol=1e-6)
    turned = EulerSpec(density=3, momentum=(2, 1), energy=0, cell_volume=SPEC.cell_volume)
    order = [3, 2, 1, 0]
    torch.testing.assert_close(grids(turned).rollout(gas()[:, order], 1, 16)[:, :, order], grids().rollout(gas(), 1, 16))


def test_the_solver_follows_from_the_data(tmp_path):
    paths = generate(GenerateConfig(out=str(tmp_path), split="test", n=2, grid=8, frames=3, t_end=0.1, presets=("riemann4",), cfl=0.6))
    source = open_trajectories([str(p) for p in paths])
    solver = solver_of(source, source.spec, 4)
    assert isinstance(solver, EulerGrids) and (solver.cfl, solver.boundary, solver.extent) == (0.6, ("periodic",) * 2, (1.0, 1.0))
    assert solver.time_step == pytest.approx(0.05) and not solver.compiled
    with pytest.raises(ArgumentError, match="takes density, momentum along every axis and energy"):
        solver_of(source, EulerSpec(extra=(4,)), 4)
    with pytest.raises(ArgumentError, match="the data are of another physics"):
        solver_of(source, StateSpec.fields("u"), 4)


def test_flows_of_other_parameters_are_refused(tmp_path):
    places = []
    for i, viscosity in enumerate((0.02, 0.05)):
        flow = replace(KolmogorovFlow(), viscosity=viscosity, spin_up=0.1)
        places += generate(
            GenerateConfig("kolmogorov", str(tmp_path / str(i)), "test", 1, grid=16, factor=1, frames=2, t_end=0.1, kolmogorov=flow)
        )
    one, both = open_trajectories([str(places[0])]), open_trajectories([str(p) for p in places])
    assert isinstance(solver_of(one, one.spec, 1), KolmogorovGrids)
    with pytest.raises(ArgumentError, match="flows with other parameters"):
        solver_of(both, both.spec, 2)


@pytest.mark.parametrize(
    "solver, cells, message",
    [
        (KolmogorovGrids((16, 16), 0.1, PARAMETERS), (16, 15), r"eval.solvers is \[16, 15\]; 15 is no even number of at least 9 cells"),
        (KolmogorovGrids((16, 16), 0.1, PARAMETERS), (8,), "8 is no even number of at least 9 cells"),
        (grids(), (16, 24), "a grid of 24 cells neither divides the 16 of the data nor is a multiple"),
        (grids(), (2,), "fewer than 4"),
        (StepSolver(torch.clone, (16, 16)), (32,), "has the model's grid, not one of 32 cells"),
    ],
)
def test_grids_that_it_does_not_take_are_refused(solver, cells, message):
    solver.check((16,))
    with pytest.raises(ArgumentError, match=message):
        solver.check(cells)
