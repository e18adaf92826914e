"""The boundary conditions of The Well's layout: closed only where every part of every side is."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from tests.data.layouts import write_the_well
from ttcfast.data import TrajectoryFile


def with_sides(path, *sides):
    """``sides``: (kind, dims[, cells of the mask that are True])."""
    write_the_well(path, 1)
    with h5py.File(path, "r+") as file:
        del file["boundary_conditions"]
        for number, (kind, dims, *cells) in enumerate(sides):
            group = file.create_group(f"boundary_conditions/part_{number}")
            group.attrs["bc_type"], group.attrs["associated_dims"] = kind, dims
            if cells:
                mask = np.zeros(8, bool)
                mask[cells[0]] = True
                group["mask"] = mask
    return TrajectoryFile(path).spec


@pytest.mark.parametrize(
    ("sides", "periodic", "closed"),
    [
        ((("WALL", ["x"]), ("PERIODIC", ["y"])), (False, True), True),
        ((("WALL", ["x", "y"]),), (False, False), True),
        ((("OPEN", ["x"]), ("WALL", ["x"]), ("PERIODIC", ["y"])), (False, True), False),
        ((("WALL", ["x"]), ("OPEN", ["x"]), ("WALL", ["y"])), (False, False), False),
        ((("WALL", ["x"]),), (False, False), False),  # nothing is said of y
        ((("OPEN", ["x"]), ("OPEN", ["y"])), (False, False), False),
        ((("PERIODIC", ["x"]), ("OPEN", ["x"]), ("PERIODIC", ["y"])), (False, True), False),
        ((("PERIODIC", ["x"]), ("PERIODIC", ["y"])), (True, True), False),
        ((("INFLOW", ["x"]), ("WALL", ["x"]), ("WALL", ["y"])), (False, False), False),
        ((("WALL", ["x"], [0]), ("PERIODIC", ["y"])), (False, True), False),  # the other end of x is not said to be a wall
        ((("WALL", ["x"], [0]), ("WALL", ["x"], [-1]), ("PERIODIC", ["y"], [0])), (False, True), True),
        ((("WALL", ["x"], [0, -1]), ("WALL", np.array(["y"], dtype="S1"), [0, -1])), (False, False), True),
        (((["WALL"], "x"), (np.array([b"WALL"]), b"y")), (False, False), True),
    ],
)
def test_a_domain_is_closed_where_every_part_of_it_is(tmp_path, sides, periodic, closed):
    spec = with_sides(tmp_path / "a.hdf5", *sides)
    assert (spec.periodic_axes, spec.closed) == (periodic, closed)
    assert spec.conserved_channels == ((0, 1, 2, 3) if all(periodic) else (0, 3) if closed else ())
