"""What counts as one set: grids, instants and attributes that differ by rounding do, all others do not."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from tests.data.layouts import write_pdebench, write_the_well
from ttcfast.data import TrajectoryFile, open_trajectories
from ttcfast.data.alike import agree, spec_difference, times_difference
from ttcfast.data.pairs import WindowSampler
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec


def well(path, *, times=None, x=None, y=None, gamma=1.4):
    write_the_well(path, 2, gamma=gamma)
    with h5py.File(path, "r+") as file:
        for name, values in (("time", times), ("x", x), ("y", y)):
            if values is not None:
                del file[f"dimensions/{name}"]
                file[f"dimensions/{name}"] = values
    return path


CELLS = (np.arange(8) + 0.5) / 8
TIMES = 0.015 * np.arange(5)


@pytest.mark.parametrize(
    "change",
    [
        {"x": (CELLS + 1).astype("f4")},
        {"x": (CELLS - 300).astype("f4"), "y": CELLS[::1]},
        {"times": TIMES},  # float64, where the first has float32
        {"times": (TIMES * (1 + 1e-6)).astype("f4")},
    ],
)
def test_rounding_makes_no_other_set(tmp_path, change):
    files = [well(tmp_path / "a.hdf5"), well(tmp_path / "b.hdf5", **change)]
    data = open_trajectories(files)
    assert len(data) == 4 and len(WindowSampler(data)) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": 2 * TIMES}, r"b\.hdf5 has time step 1 of 0\.03; .*a\.hdf5 has 0\.015: read them in two runs"),
        ({"times": TIMES[[0, 1, 2, 3, 4]] + [0, 0, 0.005, 0, 0]}, r"time step 2 of 0\.02; .* has 0\.015"),  # the mean step is the same
        ({"times": TIMES + 3}, r"its first frame at time 3; .* has 0"),
        ({"times": 1e-6 * TIMES}, r"time step 1 of 1\.5e-08; .* has 0\.015"),
        ({"times": 1.001 * TIMES}, "time step 1 of"),
        ({"x": 2 * CELLS, "y": CELLS / 2}, r"cell size \(0\.25, 0\.0625\); .* has \(0\.125, 0\.125\)"),  # the volume is the same
        ({"x": 1.001 * CELLS}, "cell size"),
    ],
)
def test_other_times_and_cells_are_another_set(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        open_trajectories([well(tmp_path / "a.hdf5"), well(tmp_path / "b.hdf5", **change)])


def test_tiny_time_steps_are_told_apart(tmp_path):
    files = [well(tmp_path / name, times=scale * np.arange(5)) for name, scale in (("a.hdf5", 1e-7), ("b.hdf5", 4e-7))]
    with pytest.raises(DataError, match=r"time step 1 of 4e-07; .* has 1e-07"):
        open_trajectories(files)


@pytest.mark.parametrize("value", [0.01, "1e-8", b"1e-8", [0.01], np.nan, np.float32(0.01), [["0.5"]]])
def test_attributes_are_numbers_however_they_are_stored(tmp_path, value):
    for name in "ab":
        write_pdebench(tmp_path / f"{name}_periodic.hdf5", 1)
        with h5py.File(tmp_path / f"{name}_periodic.hdf5", "r+") as file:
            file.attrs["eta"] = value
    data = open_trajectories([tmp_path / "a_periodic.hdf5", tmp_path / "b_periodic.hdf5"])
    assert data.files[0].parameters["eta"] == pytest.approx(float(np.asarray(value).reshape(-1)[0]), nan_ok=True)


@pytest.mark.parametrize("value", ["thick", [0.01, 0.02], 1 + 2j])
def test_attributes_that_are_no_number_are_named(tmp_path, value):
    write_pdebench(tmp_path / "a_periodic.hdf5", 1)
    with h5py.File(tmp_path / "a_periodic.hdf5", "r+") as file:
        file.attrs["eta"] = value
    with pytest.raises(DataError, match=r"attribute eta is .*; expected one number"):
        open_trajectories(tmp_path / "a_periodic.hdf5")


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_an_attribute_that_one_file_lacks_is_a_difference(tmp_path, order):
    for name in "ab":
        write_pdebench(tmp_path / f"{name}_periodic.hdf5", 1)
    with h5py.File(tmp_path / "b_periodic.hdf5", "r+") as file:
        del file.attrs["eta"]
    with pytest.raises(DataError, match=r"has eta (None|0\.01); .* has (0\.01|None)"):
        open_trajectories([tmp_path / f"{name}_periodic.hdf5" for name in order])


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2,)])
def test_a_gamma_per_trajectory_may_have_axes_of_length_one(tmp_path, shape):
    write_the_well(tmp_path / "a.hdf5", 2, gamma=[1.3, 1.6])
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        values = file["scalars/gamma"][:].reshape(shape)
        del file["scalars/gamma"]
        file["scalars/gamma"] = values
    assert TrajectoryFile(tmp_path / "a.hdf5").spec.gamma.tolist() == [1.3, 1.6]


def test_gammas_that_differ_by_rounding_are_one(tmp_path):
    well(tmp_path / "a.hdf5", gamma=5 / 3)
    data = open_trajectories([tmp_path / "a.hdf5", well(tmp_path / "b.hdf5", gamma=[5 / 3, 1.6666667])])
    assert data.spec.gamma == pytest.approx(5 / 3, rel=1e-6) and isinstance(data.spec.gamma, float)


def test_numbers_agree():
    assert agree(1.0, 1 + 5e-5) and not agree(1.0, 1 + 2e-4) and agree([np.nan, 1], [np.nan, 1]) and not agree(np.nan, 1.0)
    assert agree(0.0, 0.0) and not agree(0.0, 1e-9) and agree(0.0, 1e-9, rounding=1e-8) and agree(np.inf, np.inf)
    assert times_difference(torch.arange(3.0), torch.arange(4.0)) == ("frames", "3", "4")


def test_layouts_of_states_differ_by_name():
    a = StateSpec.euler2d(cell_volume=1 / 64)
    assert spec_difference(a, a.replace(cell_volume=(1 + 1e-6) / 64)) is None
    assert spec_difference(a.replace(cell_volume=torch.full((2, 2), 0.5)), a.replace(cell_volume=torch.full((2, 2), 0.5))) is None
    assert spec_difference(a, a.replace(gamma=1.5)) == ("gamma", "1.4", "1.5")
    assert spec_difference(a, a.replace(periodic=False, closed=True))[0] == "periodic axes"
    assert spec_difference(a, a.replace(energy=4, pressure=3))[0] == "channels"


def test_a_complex_gamma_and_endless_times_are_refused(tmp_path):
    for change, message in (("gamma", "scalars/gamma is of complex64"), ("time", "does not increase")):
        path = well(tmp_path / f"{change}.hdf5")
        with h5py.File(path, "r+") as file:
            if change == "gamma":
                del file["scalars/gamma"]
                file["scalars/gamma"] = np.complex64(1.4)
            else:
                file["dimensions/time"][-1] = np.inf
        with pytest.raises(DataError, match=message):
            TrajectoryFile(path)
