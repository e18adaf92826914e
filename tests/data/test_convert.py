"""Layouts into each other: a change of names is exact, a change of variables is the ideal gas, what is unknown is refused."""

from __future__ import annotations

import pytest
import torch

from ttcfast.data import to_spec
from ttcfast.data.convert import on_grid_of
from ttcfast.physics.equation_of_state import to_primitive
from ttcfast.spec import StateSpec

PRIMITIVE = {
    "pdegym": StateSpec.pdegym(),
    "pdebench": StateSpec.pdebench(gamma=1.4),
    "with a tracer": StateSpec.pdegym(extra=(4,)),
}


def states(spec: StateSpec, *lead: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 0.5 + torch.rand(*lead, spec.num_channels, *[4] * spec.ndim, dtype=dtype)


@pytest.mark.parametrize("spec", PRIMITIVE.values(), ids=PRIMITIVE)
def test_the_way_there_and_back_is_the_identity(spec):
    x = states(spec, 3)
    conserved = to_spec(x, spec, StateSpec.euler2d())
    back = to_spec(conserved, StateSpec.euler2d(), spec.replace(extra=()))
    torch.testing.assert_close(back, x[:, : back.shape[1]], rtol=1e-13, atol=1e-13)


def test_conserved_variables_are_those_of_the_ideal_gas():
    x = states(StateSpec.pdegym(), 2)
    u = to_spec(x, StateSpec.pdegym(), StateSpec.euler2d())
    torch.testing.assert_close(to_primitive(u, 1.4), x, rtol=1e-13, atol=1e-13)
    rho, vx, vy, p = x.unbind(1)
    assert torch.equal(u[:, 1], rho * vx) and torch.allclose(u[:, 3], p / 0.4 + 0.5 * rho * (vx**2 + vy**2))


def test_each_problem_has_its_own_gamma_and_frames_may_stand_between():
    gamma = torch.tensor([1.2, 1.7])
    x = states(StateSpec.pdegym(), 2, 3)  # [N, T, C, X, Y]
    got = to_spec(x, StateSpec.pdegym(gamma=gamma), StateSpec.euler2d())
    for i, g in enumerate(gamma.tolist()):
        torch.testing.assert_close(got[i], to_spec(x[i], StateSpec.pdegym(gamma=g), StateSpec.euler2d()), rtol=1e-6, atol=0)
    single = to_spec(x[0, 0], StateSpec.pdegym(), StateSpec.euler2d())
    assert torch.equal(single, to_spec(x, StateSpec.pdegym(), StateSpec.euler2d())[0, 0])


def test_a_named_quantity_is_taken_and_not_computed():
    x = states(StateSpec.pdegym(energy=4), 2)
    assert torch.equal(to_spec(x, StateSpec.pdegym(energy=4), StateSpec.euler2d())[:, 3], x[:, 4])
    well = states(StateSpec.well(), 2)
    assert torch.equal(to_spec(well, StateSpec.well(), StateSpec.pdegym())[:, 3], well[:, 2])
    full = to_spec(x[:, :4], StateSpec.pdegym(), StateSpec.well())
    torch.testing.assert_close(full[:, 2], x[:, 3])
    torch.testing.assert_close(full[:, 0], to_spec(x[:, :4], StateSpec.pdegym(), StateSpec.euler2d())[:, 3])


def test_reordering_changes_no_bit_and_drops_what_is_not_asked_for():
    x = states(StateSpec.well(), 2, dtype=torch.float32)
    assert torch.equal(to_spec(x, StateSpec.well(), StateSpec.euler2d()), x[:, [1, 3, 4, 0]])
    traced = states(StateSpec.pdegym(extra=(4,)), 2)
    kept = to_spec(traced, StateSpec.pdegym(extra=(4,)), StateSpec.euler2d(extra=(4,)))
    assert torch.equal(kept[:, 4], traced[:, 4])
    same = states(StateSpec.euler2d(), 2)
    assert to_spec(same, StateSpec.euler2d(), StateSpec.euler2d(gamma=1.6)) is same


def test_rounding_happens_once():
    x = states(StateSpec.pdegym(), 4, dtype=torch.float32)
    exact = to_spec(x.double(), StateSpec.pdegym(), StateSpec.euler2d())
    assert torch.equal(to_spec(x, StateSpec.pdegym(), StateSpec.euler2d()), exact.float())


def test_one_and_three_dimensions():
    for ndim, target in ((1, StateSpec.euler1d()), (3, StateSpec.euler3d())):
        spec = StateSpec.pdebench(momentum=tuple(range(ndim)), density=ndim, pressure=ndim + 1, ndim=ndim)
        x = states(spec, 2)
        u = to_spec(x, spec, target)
        torch.testing.assert_close(to_primitive(u, 5 / 3)[:, -1], x[:, ndim + 1], rtol=1e-13, atol=1e-13)


def test_the_conversion_is_differentiable():
    x = states(StateSpec.pdegym(), 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: to_spec(x, StateSpec.pdegym(), StateSpec.euler2d()), x)


def test_the_grid_and_the_gas_come_from_the_data():
    grid = StateSpec.pdebench(gamma=torch.tensor([1.3, 1.5]), cell_volume=0.25, periodic=(True, False))
    spec = on_grid_of(StateSpec.euler2d(), grid)
    assert spec.variables == "conserved" and spec.cell_volume == 0.25 and spec.periodic == (True, False)
    assert torch.equal(spec.gamma, grid.gamma)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (StateSpec.pdegym(), StateSpec.euler3d(), "source has 2 dimensions and 2 velocity components, target 3 and 3"),
        (StateSpec.pdegym(), StateSpec.euler2d(extra=(4,)), "target has 1 extra channels and source 0"),
        (StateSpec.pdegym(), StateSpec.euler2d(energy=5), r"target gives channels \[3, 4\] no meaning"),
        (StateSpec.pdegym(gamma=torch.tensor([1.4, 1.5, 1.6])), StateSpec.euler2d(), "gamma has 3 values for 2 problems"),
        (StateSpec.pdegym(energy=4), StateSpec.euler2d(), "x has 4 channels"),
        (StateSpec.euler3d(), StateSpec.euler3d(), "x has 2 channels"),
    ],
)
def test_what_cannot_be_converted_is_named(source, target, message):
    with pytest.raises(ValueError, match=message):
        to_spec(states(StateSpec.pdegym(), 2), source, target)
