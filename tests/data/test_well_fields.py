"""Fields of any physics in The Well's layout: read as they are stored, declared by the file's own layout, written and read again."""

from __future__ import annotations

import json
import math

import h5py
import numpy as np
import pytest
import torch
import yaml

from tests.data.layouts import write_well_fields
from ttcfast.data import TrajectoryFile, field_statistics, open_trajectories, write_statistics, write_well
from ttcfast.data.well_fields import LAYOUT, tensor_fields
from ttcfast.runtime.errors import DataError
from ttcfast.spec import EulerSpec, FieldSpec, StateSpec

NAMES = ("concentration", "mask", "forcing", "profile", "velocity_x", "velocity_y", "stress_xx", "stress_xy", "stress_yx", "stress_yy")


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "a.hdf5"
    return path, write_well_fields(path)


def declare(path, **layout):
    with h5py.File(path, "r+") as file:
        file.attrs[LAYOUT] = json.dumps(layout)
    return TrajectoryFile(path)


def test_every_field_is_read_in_the_order_of_the_files_lists(stored):
    path, held = stored
    file = TrajectoryFile(path)
    assert isinstance(file.spec, FieldSpec) and file.spec.names == NAMES == tuple(held)
    assert len(file) == 3 and file.shape == (8, 6) and file.times.tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    for i in range(3):
        np.testing.assert_array_equal(file[i].numpy(), np.stack([held[name][i] for name in NAMES], 1))
    np.testing.assert_array_equal(file.read(2, 1, 3).numpy(), file[2][1:3].numpy())


def test_the_files_metadata_make_the_layout(stored):
    spec = TrajectoryFile(stored[0]).spec
    assert spec.given == ("mask", "profile")  # what does not vary in time
    assert spec.periodic_axes == (True, False) and spec.ndim == 2
    assert spec.distances == pytest.approx((10 / 8, 10 / 6)) and spec.cell_volume == pytest.approx(100 / 48)
    assert spec.vectors == ((4, 5),) and spec.conserved_channels == ()  # no file says what is conserved


def test_numbers_of_whole_trajectories_are_read_and_follow_the_choice_of_trajectories(stored):
    path = stored[0]
    file = TrajectoryFile(path)
    assert set(file.scalars) == {"nu", "L"}  # drive varies in time
    torch.testing.assert_close(file.scalars["nu"], torch.linspace(0.1, 0.3, 3, dtype=torch.float64))
    chosen = open_trajectories([path, path]).subset([4, 0])
    torch.testing.assert_close(chosen.scalars["nu"], torch.tensor([0.2, 0.1], dtype=torch.float64))
    assert chosen.scalars["L"].tolist() == [10, 10]


@pytest.mark.parametrize("shape", [(8,), (4, 6), (4, 6, 5)])
def test_any_number_of_dimensions(tmp_path, shape):
    held = write_well_fields(tmp_path / "a.hdf5", shape=shape)
    file = TrajectoryFile(tmp_path / "a.hdf5")
    np.testing.assert_array_equal(file[1].numpy(), np.stack([held[name][1] for name in file.spec.names], 1))
    assert set(file.spec.names) == set(held)


def test_a_declared_layout_says_what_no_file_can(stored):
    file = declare(
        stored[0], conserved={"solute": ["concentration"]}, bounds={"concentration": [0, 1]}, divergence_free=["velocity_x", "velocity_y"]
    )
    assert file.spec.conserved_groups == {"solute": (0,)} and file.spec.bounded_channels == {0: (0.0, 1.0)}
    assert file.spec.solenoidal == ((4, 5),) and file.spec.given == ("mask", "profile")
    assert file.spec.distances == pytest.approx((10 / 8, 10 / 6))


def test_a_declared_layout_chooses_and_orders_channels(stored):
    path, held = stored
    names = ("velocity_y", "concentration", "stress_xy")
    file = declare(path, names=names, given=[])
    assert file.spec.names == names
    np.testing.assert_array_equal(file[1].numpy(), np.stack([held[name][1] for name in names], 1))


def test_a_declared_gas_is_one(tmp_path):
    path, first = tmp_path / "a.hdf5", torch.rand(2, 3, 4, 8, 8) + 1
    write_well(path, first, [0, 1, 2], StateSpec.fields("density", "velocity_x", "velocity_y", "pressure"), dataset_name="a")
    with h5py.File(path, "r+") as file:
        del file.attrs["ttcfast_checksum"]
        # density and pressure come first, as scalars; then the velocity
        file.attrs[LAYOUT] = json.dumps(StateSpec.pdegym(pressure=1, momentum=(2, 3), gamma=1.3).to_meta() | {"cell_volume": 0.5})
    read = TrajectoryFile(path)
    assert isinstance(read.spec, EulerSpec) and read.spec.gamma == 1.3 and read.spec.cell_volume == 0.5
    assert torch.equal(read[1], first[1][:, [0, 3, 1, 2]])


@pytest.mark.parametrize(
    "spec",
    [
        StateSpec.fields("vorticity", conserved="all", spacing=(0.2, 0.3), cell_volume=0.06),
        StateSpec.fields("h", "u", ndim=1, periodic=False, conserved="h", bounds={"h": (0, None)}, spacing=(0.5,), cell_volume=0.5),
        StateSpec.fields(
            *("velocity_y", "p", "velocity_x", "stress_xx", "mask", "stress_yy", "stress_xy", "stress_yx"),
            periodic=(True, False),
            divergence_free=("velocity_x", "velocity_y"),
            mean_zero="p",
            given="mask",
        ),
        StateSpec.fields("a_x", "a_y", "a_z", "b", ndim=3, bounds={"b": (-math.inf, 9)}),
        StateSpec.fields("t", conserved="all", cell_volume=torch.linspace(1, 2, 48, dtype=torch.float64).reshape(8, 6)),
        StateSpec.fields("t", boundary_mask=torch.eye(8, 6, dtype=torch.bool), boundary_value=torch.tensor([[[2.0]]]), periodic=False),
    ],
    ids=["scalar", "1d", "tensors", "3d", "volumes", "boundary"],
)
def test_what_is_written_is_read(tmp_path, spec):
    shape = (8, 6, 5)[: spec.ndim]
    first = torch.rand(2, 3, len(spec.names), *shape, generator=torch.Generator().manual_seed(0))
    first[:, :, list(spec.given_channels)] = first[:, :1, list(spec.given_channels)]
    parameters, scalars = {"seed": 1}, {"nu": [0.5, 0.25], "L": 2.0}
    write_well(tmp_path / "a.hdf5", first, [0.0, 0.5, 1.0], spec, dataset_name="mine", parameters=parameters, scalars=scalars)
    file = TrajectoryFile(tmp_path / "a.hdf5")
    assert all(torch.equal(file[i], first[i]) for i in range(2))
    assert file.spec.to_meta(boundary=True) == spec.to_meta(boundary=True)
    assert file.parameters == parameters and file.scalars["nu"].tolist() == [0.5, 0.25] and float(file.scalars["L"]) == 2.0
    with h5py.File(tmp_path / "a.hdf5") as held:
        listed = {name for group in ("t0_fields", "t1_fields", "t2_fields") for name in held[group].attrs["field_names"]}
        assert listed == set(tensor_fields(spec.names, spec.ndim))
        if "mask" in spec.names:
            assert held["t0_fields/mask"].shape == (2, 8, 6) and not held["t0_fields/mask"].attrs["time_varying"]
            assert held["t2_fields/stress"].shape == (2, 3, 8, 6, 2, 2)


def test_statistics_have_one_entry_per_field(tmp_path):
    spec = StateSpec.fields("velocity_y", "p", "velocity_x", "s_xx", "s_xy", "s_yx", "s_yy")
    write_well(tmp_path / "a.hdf5", torch.rand(2, 3, 7, 8, 6), [0, 1, 2], spec, dataset_name="mine")
    write_statistics([tmp_path / "a.hdf5"], tmp_path / "stats.yaml")
    found, held = yaml.safe_load((tmp_path / "stats.yaml").read_text()), field_statistics([tmp_path / "a.hdf5"])
    assert set(found) == {f"{name}{kind}" for name in ("mean", "std", "rms") for kind in ("", "_delta")}
    mean = held.mean.tolist()
    assert found["mean"] == {"velocity": [mean[2], mean[0]], "p": mean[1], "s": [mean[3:5], mean[5:7]]}


def test_uneven_coordinates_give_cells_of_their_own_volumes(stored):
    path = stored[0]
    with h5py.File(path, "r+") as file:
        file["dimensions/y"][...] = [1, 2, 4, 8, 16, 32]
    spec = TrajectoryFile(path).spec
    widths = torch.tensor([1, 1.5, 3, 6, 12, 16], dtype=torch.float64)
    torch.testing.assert_close(spec.cell_volume, (10 / 8 * widths).expand(8, 6))
    with pytest.raises(DataError, match="divergence_free needs evenly spaced coordinates, or a spacing"):
        declare(path, divergence_free=["velocity_x", "velocity_y"])


def test_other_names_of_axes(stored):
    path = stored[0]
    with h5py.File(path, "r+") as file:
        for old, new in (("x", "r"), ("y", "theta")):
            file.move(f"dimensions/{old}", f"dimensions/{new}")
            file[f"boundary_conditions/{old}_boundary"].attrs["associated_dims"] = [new]
        file["dimensions"].attrs["spatial_dims"] = ["r", "theta"]
    spec = TrajectoryFile(path).spec
    assert spec.names[4:8] == ("velocity_r", "velocity_theta", "stress_rr", "stress_rtheta") and spec.periodic_axes == (True, False)


def test_values_outside_the_declared_bounds_are_named(stored):
    path, held = stored
    file = declare(path, bounds={"concentration": [0, 0.5]})
    low, high = held["concentration"][1, 2].min(), held["concentration"][1, 2].max()
    said = rf"trajectory 1 holds concentration from {low:g} to {high:g} in frame 2, outside its bounds \(0.0, 0.5\); widen"
    with pytest.raises(DataError, match=said):
        file.read(1, 2, 4)
    file.close()
    declare(path, bounds={"concentration": [0, 1]}).read(1)


def test_values_that_are_not_finite_are_named(stored):
    path = stored[0]
    with h5py.File(path, "r+") as file:
        file["t1_fields/velocity"][1, 3, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="trajectory 1 holds values that are not finite in frame 3; make it again"):
        TrajectoryFile(path)[1]


def change(path, how):
    with h5py.File(path, "r+") as file:
        how(file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda f: f["t0_fields"].attrs.__setitem__("field_names", ["u"]), "t0_fields lists u, which is not there; found boundary_cond"),
        (lambda f: [f.__delitem__(g) for g in ("t0_fields", "t1_fields", "t2_fields")], "or other fields not there"),
        (lambda f: [f[g].attrs.__setitem__("field_names", []) for g in ("t0_fields", "t1_fields", "t2_fields")], "hold no field"),
        (
            lambda f: f["t1_fields/velocity"].attrs.__setitem__("time_varying", False),
            r"velocity has shape .* it should be \[sample, 8, 6, 2\]",
        ),
        (
            lambda f: f["t0_fields/mask"].attrs.__setitem__("dim_varying", [True]),
            r"mask has dim_varying \[True\]; the file has 2 space axes",
        ),
        (lambda f: f["dimensions"].attrs.__setitem__("spatial_dims", []) or f.__delitem__("dimensions/y"), "concentration has dim_varying"),
        (lambda f: f["dimensions/y"].__setitem__(slice(None), [0, 2, 1, 3, 4, 5]), "dimensions/y runs from 0 to 5 and turns on the way"),
        (lambda f: f.attrs.__setitem__(LAYOUT, "{"), "its root attribute ttcfast_layout is no JSON"),
        (lambda f: f.attrs.__setitem__(LAYOUT, "[1]"), r"its root attribute ttcfast_layout is '\[1\]'; write json.dumps"),
        (lambda f: f.attrs.__setitem__(LAYOUT, '{"names": ["u"], "given": []}'), "ttcfast_layout names u; the file holds concentration, "),
        (
            lambda f: f.attrs.__setitem__(LAYOUT, '{"conserved": "q"}'),
            "is no layout of its fields: conserved quantity 'q' names 'q', which is",
        ),
        (lambda f: f.attrs.__setitem__(LAYOUT, '{"colour": 1}'), "is no layout of its fields: .*unexpected keyword argument 'colour'"),
        (lambda f: f.attrs.__setitem__(LAYOUT, '{"ndim": 1, "periodic": true, "spacing": [1]}'), "has 1 space dimensions; the file has 2"),
        (lambda f: f.attrs.__setitem__(LAYOUT, '{"cell_volume": [[1, 2]]}'), r"has cell volumes \[1, 2\]; the file has cells \[8, 6\]"),
    ],
)
def test_a_file_that_contradicts_itself_is_one_clear_error(stored, how, said):
    change(stored[0], how)
    with pytest.raises(DataError, match=said):
        TrajectoryFile(stored[0])


def test_fields_with_other_numbers_of_trajectories_are_refused(stored):
    def cut(file):
        values, held = file["t0_fields/mask"][:2], dict(file["t0_fields/mask"].attrs)
        del file["t0_fields/mask"]
        file["t0_fields/mask"] = values
        file["t0_fields/mask"].attrs.update(held)

    change(stored[0], cut)
    with pytest.raises(DataError, match="fields hold other numbers of trajectories: t0_fields/concentration 3, t0_fields/mask 2"):
        TrajectoryFile(stored[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"times": [0, 1]}, "times has 2 entries and trajectories 3 frames"),
        ({"boundary": ["periodic"]}, r"boundary is \('periodic',\); give one of periodic, outflow, reflecting for each of 2 axes"),
        ({"boundary": ["periodic", "wall"]}, "give one of periodic, outflow, reflecting"),
        ({"scalars": {"nu": [1, 2, 3]}}, r"scalars\['nu'\] has shape \(3,\); give one number, or one per trajectory \(2,\)"),
        ({"trajectories": torch.zeros(2, 3, 2, 8)}, "expected .* with 2 space axes"),
        ({"trajectories": torch.zeros(2, 3, 3, 8, 6)}, "trajectories have 3 channels; the spec names 2: u, v"),
        ({"spec": StateSpec.pdegym(), "trajectories": torch.ones(2, 3, 4, 8, 6)}, "spec has primitive variables; convert trajectories"),
    ],
)
def test_what_cannot_be_written_is_one_clear_error(tmp_path, options, said):
    given = {"trajectories": torch.zeros(2, 3, 2, 8, 6), "times": [0, 1, 2], "spec": StateSpec.fields("u", "v")} | options
    with pytest.raises(ValueError, match=said):
        write_well(tmp_path / "a.hdf5", **given, dataset_name="mine")
    assert not list(tmp_path.iterdir())


def test_components_are_grouped_where_all_are_there():
    assert tensor_fields(("v_y", "v_x", "p"), 2) == {"v": ("v_x", "v_y"), "p": ("p",)}
    assert tensor_fields(("v_x", "p_y"), 2) == {"v_x": ("v_x",), "p_y": ("p_y",)}
    assert tensor_fields(("v_x", "v_y"), 3) == {"v_x": ("v_x",), "v_y": ("v_y",)}
    assert tensor_fields(("v", "v_x", "v_y"), 2) == {"v": ("v",), "v_x": ("v_x",), "v_y": ("v_y",)}
    assert tensor_fields(("u_x",), 1) == {"u_x": ("u_x",)}


def test_cells_of_a_sphere_shrink_towards_its_poles(stored):
    path = stored[0]
    theta = (torch.arange(8, dtype=torch.float64) + 0.5) * torch.pi / 8
    with h5py.File(path, "r+") as file:
        for old, new in (("x", "theta"), ("y", "phi")):
            file.move(f"dimensions/{old}", f"dimensions/{new}")
        file["dimensions"].attrs["spatial_dims"] = ["theta", "phi"]
        file["dimensions/theta"][...] = theta.numpy()
        file["dimensions/phi"][...] = torch.arange(6).double().numpy() * torch.pi / 3
        flat = TrajectoryFile(path).spec.cell_volume
        file.attrs["grid_type"] = "equiangular"
    assert flat == pytest.approx(torch.pi**2 / 24)
    torch.testing.assert_close(TrajectoryFile(path).spec.cell_volume, (flat * theta.sin()).unsqueeze(1).expand(8, 6))


def test_a_chosen_channel_may_leave_out_what_is_given(stored):
    assert declare(stored[0], names=["concentration"], conserved="all").spec.given == ()


@pytest.mark.parametrize(
    "layout, said",
    [
        ({"boundary_mask": [[True]]}, r"has a boundary mask \[1, 1\]; the file has cells \[8, 6\]"),
        ({"boundary_value": [[[1.0, 2.0]]]}, r"has boundary values \[1, 1, 2\]; they must broadcast to"),
        ({"periodic": "no"}, "periodic is 'no'"),
    ],
)
def test_a_layout_that_does_not_fit_the_cells_is_one_clear_error(stored, layout, said):
    with pytest.raises(DataError, match=said):
        declare(stored[0], **layout)
