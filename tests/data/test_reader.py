"""What holds for a file of any format: values that no gas has, files of one frame, a changed folder, pipes, upper-case names."""

from __future__ import annotations

import os
import pickle
import resource
import signal

import h5py
import numpy as np
import pytest
import torch

from tests.data.layouts import write_pdebench, write_pdegym, write_the_well
from ttcfast.data import PDEBenchFile, field_statistics, open_trajectories
from ttcfast.data.pairs import WindowSampler
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec

WRITERS = pytest.mark.parametrize(
    ("write", "name"), [(write_the_well, "a.hdf5"), (write_pdegym, "data_0.nc"), (write_pdebench, "2D_periodic.hdf5")]
)


def spoil(path, name: str, value: float, place=(1, 3, 2, 2)) -> None:
    with h5py.File(path, "r+") as file:
        file[name][place] = value


@pytest.mark.parametrize("value", [0.0, -0.5, np.nan, np.inf])
@pytest.mark.parametrize(
    ("write", "file", "name", "place"),
    [
        (write_the_well, "a.hdf5", "t0_fields/density", (1, 3, 2, 2)),
        (write_the_well, "a.hdf5", "t0_fields/energy", (1, 3, 2, 2)),
        (write_pdegym, "data_0.nc", "data", (1, 3, 0, 2, 2)),
        (write_pdebench, "2D_periodic.hdf5", "density", (1, 3, 2, 2)),
    ],
)
def test_values_that_no_gas_has_are_refused_with_their_place(tmp_path, write, file, name, place, value):
    write(tmp_path / file, 2)
    spoil(tmp_path / file, name, value, place)
    data = open_trajectories(tmp_path / file)
    said = f"a (density|total energy) of {value:g}" if np.isfinite(value) else "values that are not finite"
    with pytest.raises(DataError, match=rf"{file}: trajectory 1 holds {said} in frame 3, which no gas has"):
        data.read(1, 2, 5)
    assert data.read(1, 0, 3).isfinite().all() and data[0].isfinite().all()


def test_a_negative_pressure_and_velocity_that_is_not_finite_are_refused_and_zero_pressure_is_read(tmp_path):
    path = tmp_path / "2D_periodic.hdf5"
    write_pdebench(path, 2)
    spoil(path, "pressure", 0.0)
    assert PDEBenchFile(path)[1][3, 3].min() == 0
    spoil(path, "pressure", -1.0)
    with pytest.raises(DataError, match="trajectory 1 holds a pressure of -1 in frame 3"):
        PDEBenchFile(path).read(1)
    spoil(path, "pressure", 1.0)
    spoil(path, "Vx", -np.inf)
    with pytest.raises(DataError, match="not finite in frame 3"):
        PDEBenchFile(path).read(1)


def test_values_whose_sum_overflows_are_read(tmp_path):
    path = tmp_path / "2D_periodic.hdf5"
    write_pdebench(path, 1)
    with h5py.File(path, "r+") as file:
        file["pressure"][:] = 3e38
    assert (PDEBenchFile(path)[0][:, 3] > 2e38).all()


def test_velocities_of_both_signs_that_cancel_hide_nothing(tmp_path):
    path = tmp_path / "2D_periodic.hdf5"
    write_pdebench(path, 1)
    spoil(path, "Vx", np.inf, (0, 0, 0, 0))
    spoil(path, "Vx", -np.inf, (0, 0, 0, 1))
    with pytest.raises(DataError, match="not finite in frame 0"):
        PDEBenchFile(path).read(0)


@pytest.mark.parametrize(
    ("write", "file", "name"),
    [(write_the_well, "a.hdf5", "t1_fields/momentum"), (write_pdegym, "a.nc", "data"), (write_pdebench, "2D_periodic.hdf5", "Vy")],
)
def test_complex_data_are_refused(tmp_path, write, file, name):
    write(tmp_path / file, 1)
    with h5py.File(tmp_path / file, "r+") as held:
        values = held[name][:].astype(np.complex64)
        del held[name]
        held[name] = values
    with pytest.raises(DataError, match=f"{name} .*of complex64"):
        open_trajectories(tmp_path / file)


@WRITERS
def test_files_of_one_frame_are_refused(tmp_path, write, name):
    write(tmp_path / name, 2, frames=1)
    with pytest.raises(DataError, match="its trajectories have 1 frame; expected at least 2"):
        open_trajectories(tmp_path / name)


@WRITERS
def test_a_relative_path_outlives_a_change_of_folder(tmp_path, monkeypatch, write, name):
    write(tmp_path / name, 2)
    monkeypatch.chdir(tmp_path)
    file = open_trajectories(name).files[0]
    there = file[0]
    file.close()
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickle.dumps(file))[0], there)


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_the_well, "A.HDF5"), (write_the_well, "a.H5"), (write_pdegym, "DATA_0.NC"), (write_pdebench, "2D_periodic_Train.Hdf5")],
)
def test_a_folder_of_upper_case_names_is_not_empty(tmp_path, write, name):
    write(tmp_path / name, 2)
    assert len(open_trajectories(tmp_path)) == 2


def test_pipes_devices_and_folders_among_the_files_are_named(tmp_path, in_time):
    write_the_well(tmp_path / "a.hdf5", 1)
    os.mkfifo(tmp_path / "b.hdf5")
    with pytest.raises(DataError, match=r"b\.hdf5 is a named pipe; give a regular file"):
        open_trajectories(tmp_path)
    with pytest.raises(DataError, match=r"b\.hdf5 is a named pipe"):
        open_trajectories(tmp_path / "b.hdf5", format="pdegym")
    (tmp_path / "b.hdf5").unlink()
    (tmp_path / "b.hdf5").mkdir()
    with pytest.raises(DataError, match=r"b\.hdf5 is a folder"):
        open_trajectories(tmp_path)
    with pytest.raises(DataError, match="is a device"):
        open_trajectories("/dev/zero")


def test_a_file_that_leads_elsewhere_is_refused_by_every_reader(tmp_path):
    for write, name, field in (
        (write_the_well, "a.hdf5", "t0_fields/density"),
        (write_pdegym, "a.nc", "data"),
        (write_pdebench, "2D_periodic.hdf5", "Vx"),
    ):
        write(tmp_path / name, 1)
        with h5py.File(tmp_path / name, "r+") as file:
            shape = file[field].shape
            del file[field]
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource("gone.h5", "x", shape)
            file.create_virtual_dataset(field, layout, fillvalue=1.0)
        with pytest.raises(DataError, match=f"points out of itself: {field} is a virtual data set"):
            open_trajectories(tmp_path / name)


def declare(path, name: str, count: int) -> None:
    """A file that declares ``count`` trajectories and holds none of their values."""
    with h5py.File(path, "r+") as file:
        shape = (count, *file[name].shape[1:])
        del file[name]
        file.create_dataset(name, shape, "f4", chunks=(1, *shape[1:]))


def in_little_memory(work) -> None:
    """``work`` in a child that may take 300 MB more than this process has."""
    child = os.fork()
    if child == 0:
        try:
            held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)
            signal.alarm(30)
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("write", "name", "fields"),
    [
        (write_the_well, "a.hdf5", ("t0_fields/density", "t0_fields/energy", "t1_fields/momentum")),
        (write_pdegym, "a.nc", ("data",)),
        (write_pdebench, "2D_periodic.hdf5", ("density", "pressure", "Vx", "Vy")),
    ],
)
def test_a_billion_declared_trajectories_take_no_memory(tmp_path, write, name, fields):
    write(tmp_path / name, 2)
    for field in fields:
        declare(tmp_path / name, field, 10**9)

    def work() -> None:
        data = open_trajectories(tmp_path / name)
        assert len(data) == 10**9 and data.index[10**9 - 1] == (0, 10**9 - 1)
        assert data.first(3).index.runs == ((0, 0, 3),) and len(data.first()) == 10**9
        assert data.spread(3).index.runs == ((0, 0, 1), (0, 500_000_000, 1), (0, 10**9 - 1, 1))
        assert len(data.converted(StateSpec.euler2d())) == 10**9
        if write is not write_the_well:
            counts = (10**9 - 7, 3, 4)
            valid = open_trajectories(tmp_path / name, split="valid", split_counts=counts)
            assert len(valid) == 3
        with pytest.raises(DataError, match=r"the data files declare 4000000000 windows; at most \d+ can be shuffled"):
            WindowSampler(data)
        for use in (lambda: data.read(7, 0, 2), lambda: field_statistics(data), lambda: data.stack()):
            with pytest.raises(DataError, match=r"trajectory . holds a (density|total energy) of 0 in frame 0"):
                use()

    in_little_memory(work)


def test_frames_and_cells_declared_beyond_the_file_are_refused(tmp_path):
    write_the_well(tmp_path / "a.hdf5", 1)
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        del file["dimensions/time"]
        file.create_dataset("dimensions/time", (10**9,), "f4", chunks=(1024,))
        for name in ("t0_fields/density", "t0_fields/energy"):
            del file[name]
            file.create_dataset(name, (1, 10**9, 8, 8), "f4", chunks=(1, 1, 8, 8))
    write_pdegym(tmp_path / "b.nc", 1)
    with h5py.File(tmp_path / "b.nc", "r+") as file:
        del file["data"]
        file.create_dataset("data", (1, 5, 5, 10**6, 10**6), "f4", chunks=(1, 1, 1, 64, 64))

    def work() -> None:
        for name in ("a.hdf5", "b.nc"):
            with pytest.raises(DataError, match=r"declared as \[1, .*bytes of it are there"):
                open_trajectories(tmp_path / name)

    in_little_memory(work)
