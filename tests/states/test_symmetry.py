"""Symmetries as a group, and what they do to the states of a layout."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttcfast.physics import EulerSolver
from ttcfast.physics.navier_stokes import VorticitySolver
from ttcfast.spec import StateSpec
from ttcfast.states.symmetry import Frames, Symmetry, group_of

GAS = StateSpec.euler2d()
FLOW = StateSpec.fields(
    "vorticity",
    symmetries=[Symmetry(flips=(True, True), shifts=(0, 1)), Symmetry(flips=(True, False), shifts=(0, 4), odd=("vorticity",))],
    translations=[0],
)


def elements(ndim: int, n: int):
    axes = st.permutations(range(ndim)).map(tuple)
    return st.builds(Symmetry, axes, st.tuples(*[st.booleans()] * ndim), st.tuples(*[st.integers(0, n - 1)] * ndim))


@given(st.data(), st.sampled_from([1, 2, 3]))
def test_one_after_the_other_is_their_product_and_undoing_gives_the_state_back(data, ndim):
    spec = {1: StateSpec.euler1d, 2: StateSpec.euler2d, 3: StateSpec.euler3d}[ndim]()
    first, second = (data.draw(elements(ndim, 4)) for _ in range(2))
    x = torch.randn(2, 3, spec.num_channels, *[4] * ndim)
    once = first.apply(x, spec)
    assert torch.equal(first.undo(once, spec), x)
    assert torch.equal(second.after(first, (4,) * ndim).apply(x, spec), second.apply(once, spec))


def test_a_gas_on_a_square_has_eight_and_in_a_cube_forty_eight():
    assert len(group_of(GAS, (8, 8))) == 8 and len(group_of(StateSpec.euler3d(), (4, 4, 4))) == 48
    assert len(group_of(StateSpec.euler1d(), (8,))) == 2
    channel = StateSpec.euler2d(periodic=(True, False))
    assert len(group_of(channel, (8, 6))) == 4 and channel.translations == (0,)
    assert StateSpec.euler2d(boundary_mask=torch.zeros(8, 8, dtype=torch.bool)).symmetries == ()
    with pytest.raises(ValueError, match=r"exchanges axes of other sizes on a grid of \(8, 6\) cells"):
        group_of(GAS, (8, 6))


def test_turning_a_vector_field_turns_its_arrows():
    x = torch.zeros(4, 5, 5)
    x[1, 4, 2] = 1.0  # on the right, to the right
    quarter = Symmetry.of(Symmetry(order=(1, 0), flips=(True, False)), 2)  # (x, y) -> (-y, x)
    turned = quarter.apply(x, GAS)
    assert turned[2, 2, 4] == 1.0 and turned.abs().sum() == 1, "at the top, upwards"


@pytest.mark.parametrize("periodic", [True, False])
def test_the_solver_of_a_gas_commutes_with_every_symmetry(periodic):
    torch.manual_seed(0)
    x = torch.tensor([1.0, 0.0, 0.0, 2.5]).view(4, 1, 1) + 0.2 * torch.randn(1, 4, 12, 12)
    spec = StateSpec.euler2d(periodic=periodic, cell_volume=1 / 144)
    solver = EulerSolver(spec, boundary="periodic" if periodic else "outflow")
    after = solver.rollout(x, [0.02])[:, 0]
    for g in group_of(spec, (12, 12)):
        torch.testing.assert_close(g.undo(solver.rollout(g.apply(x, spec), [0.02])[:, 0], spec), after, atol=2e-5, rtol=0)


def test_kolmogorov_flow_has_the_symmetries_that_its_layout_declares():
    w = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    solver = VorticitySolver(dtype=torch.float64)
    after = solver.rollout(w, [0.1])[:, 0]
    found = group_of(FLOW, (32, 32))
    assert len(found) > 4
    for g in found:
        torch.testing.assert_close(g.undo(solver.rollout(g.apply(w, FLOW), [0.1])[:, 0], FLOW), after, atol=1e-9, rtol=0)


def test_ids_walk_through_the_group_and_then_through_translations():
    ids, problems = torch.arange(24).expand(2, -1), torch.tensor([3, 5])
    frames = Frames(GAS, (8, 8), ids, problems, seed=1, step=2)
    for row in frames.elements:
        assert row[0] == group_of(GAS, (8, 8))[0] and len(set(row[:8])) == 8 and len({(g.order, g.flips) for g in row[8:16]}) == 8
        assert {(g.order, g.flips) for g in row[:8]} == {(g.order, g.flips) for g in row[8:16]} and len(set(row)) > 16
    assert frames.elements[0] != frames.elements[1]
    part = Frames(GAS, (8, 8), torch.tensor([[17, 4]]), torch.tensor([5]), seed=1, step=2)
    assert part.elements[0] == [frames.elements[1][17], frames.elements[1][4]]
    x = torch.randn(2, 24, 4, 8, 8)
    assert torch.equal(frames.back(frames.into(x)), x)


def test_declared_symmetries_are_stored_with_the_layout():
    again = StateSpec.from_meta(json.loads(json.dumps(FLOW.to_meta())))
    assert again.symmetries == FLOW.symmetries and again.translations == (0,)
    assert not {"symmetries", "translations"} & set(StateSpec.fields("u").to_meta())
    for a, b in itertools.product(group_of(FLOW, (32, 32)), repeat=2):
        assert a.after(b, (32, 32)) in group_of(FLOW, (32, 32))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"symmetries": ["turn"]}, "symmetries holds 'turn', which is no Symmetry"),
        ({"symmetries": [Symmetry(order=(0, 0))]}, "order with each of them once"),
        ({"symmetries": [Symmetry(flips=(True,))]}, "give an entry for each of 2 axes"),
        ({"symmetries": [Symmetry(odd=("w",))]}, "an odd channel of symmetries names 'w', which is no channel"),
        ({"translations": [2]}, r"translations is \(2,\); name periodic axes, from 0 to 1"),
        ({"translations": [1], "periodic": (True, False)}, "name periodic axes"),
    ],
)
def test_wrong_symmetries_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        StateSpec.fields("u", **options)
