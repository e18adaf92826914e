"""The three formats, in files as documented: the values as they lie there, the right physics, lazily; and one clear error otherwise."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import warnings

import h5py
import numpy as np
import pytest
import torch

from tests.data.layouts import write_pdebench, write_pdegym, write_the_well
from ttcfast.data import PDEBenchFile, PDEGymFile, TrajectoryFile, open_trajectories
from ttcfast.data.pairs import WindowSampler
from ttcfast.data.statistics import field_statistics
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.spec import StateSpec


@pytest.fixture
def chunks(tmp_path):
    """Twelve chunks of one trajectory each, and what they hold in numeric order ``[12, T+1, 5, X, Y]``."""
    folder = tmp_path / "CE-KH"
    folder.mkdir()
    return folder, np.concatenate([write_pdegym(folder / f"data_{c}.nc", 1, frames=2, grid=4, seed=c) for c in range(12)])


def test_pdegym_is_read_as_it_lies_in_the_file(tmp_path):
    held = write_pdegym(tmp_path / "data_0.nc", 3)
    file = PDEGymFile(tmp_path / "data_0.nc")
    assert len(file) == 3 and file.shape == (8, 8)
    assert np.array_equal(file[2], held[2]) and np.array_equal(file.read(1, 2, 4), held[1, 2:4])
    assert file.times.tolist() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    spec = file.spec
    assert (spec.variables, spec.density, spec.momentum, spec.pressure, spec.energy) == ("primitive", 0, (1, 2), 3, 4)
    assert spec.gamma == 1.4 and spec.cell_volume == pytest.approx(1 / 64) and all(spec.periodic_axes)


def test_richtmyer_meshkov_has_a_tracer_another_time_and_an_open_domain(tmp_path):
    held = write_pdegym(tmp_path / "CE-RM.nc", 2, variable="solution")
    with pytest.warns(UserWarning, match="CE-RM is not documented"):
        file = PDEGymFile(tmp_path / "CE-RM.nc")
    assert file.times.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert file.spec.extra == (4,) and file.spec.energy is None and not any(file.spec.periodic_axes)
    assert np.array_equal(file[1], held[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(PDEGymFile(tmp_path / "CE-RM.nc", periodic=True).spec.periodic_axes)


@pytest.mark.parametrize("shape", [(8,), (8, 6), (4, 6, 5)])
def test_pdebench_is_read_in_one_two_and_three_dimensions(tmp_path, shape):
    path = tmp_path / f"{len(shape)}D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_Train.hdf5"
    held = write_pdebench(path, 3, shape=shape)
    file = PDEBenchFile(path)
    names = [f"V{axis}" for axis in "xyz"[: len(shape)]] + ["density", "pressure"]
    assert np.array_equal(file[2], np.stack([held[name][2] for name in names], 1))
    assert file.times.tolist() == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])  # the file has a sixth
    spec, d = file.spec, len(shape)
    assert (spec.ndim, spec.momentum, spec.density, spec.pressure) == (d, tuple(range(d)), d, d + 1)
    assert spec.gamma == 5 / 3 and spec.cell_volume == pytest.approx(1 / np.prod(shape), rel=1e-5)
    assert file.parameters == {"eta": 0.01, "zeta": 0.01, "M": 0.1}
    if d == 2:
        assert spec.channels == StateSpec.pdebench().channels


def test_the_domain_of_pdebench_is_in_the_name_of_the_file(tmp_path):
    for name, periodic in (("1D_CFD_Shock_trans_Train", False), ("2D_CFD_Rand_M0.1_periodic_128_Train", True)):
        write_pdebench(tmp_path / f"{name}.hdf5", 1)
        assert all(PDEBenchFile(tmp_path / f"{name}.hdf5").spec.periodic_axes) is periodic
    write_pdebench(tmp_path / "renamed.hdf5", 1)
    with pytest.warns(UserWarning, match="neither periodic nor trans"):
        assert not any(PDEBenchFile(tmp_path / "renamed.hdf5").spec.periodic_axes)
    assert all(PDEBenchFile(tmp_path / "renamed.hdf5", periodic=True).spec.periodic_axes)


def test_the_well_is_read_with_its_pressure_beside(tmp_path):
    held = write_the_well(tmp_path / "a.hdf5", 2, gamma=1.22)
    file = TrajectoryFile(tmp_path / "a.hdf5")
    assert np.array_equal(file[1], np.concatenate([held["density"][1][:, None], held["momentum"][1], held["energy"][1][:, None]], 1))
    assert file.spec.gamma == 1.22 and all(file.spec.periodic_axes)
    open_side = write_the_well(tmp_path / "b.hdf5", 1, kind="OPEN")
    assert open_side and not any(TrajectoryFile(tmp_path / "b.hdf5").spec.periodic_axes)


def test_each_trajectory_of_the_well_keeps_its_own_gamma(tmp_path):
    write_the_well(tmp_path / "a.hdf5", 2, gamma=1.3)
    write_the_well(tmp_path / "b.hdf5", 3, gamma=[1.4, 1.5, 1.6], seed=1)
    data = open_trajectories(tmp_path)
    assert data.spec.gamma.tolist() == pytest.approx([1.3, 1.3, 1.4, 1.5, 1.6])
    few = data.first(3)
    assert few.spec.gamma.tolist() == pytest.approx([1.3, 1.4, 1.3])
    pressure = few.converted(StateSpec.pdegym())[1][:, 3]
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert np.allclose(pressure, file["t0_fields/pressure"][0], rtol=1e-5)
    with pytest.raises(DataError, match="gamma"):
        WindowSampler(data)  # one model is not trained on several gases without being told which
    assert open_trajectories(tmp_path / "a.hdf5").spec.gamma == 1.3


@pytest.mark.parametrize(("order", "last"), [("numeric", [10, 11]), ("lexicographic", [8, 9])])
def test_the_order_of_the_chunks_decides_the_test_split(chunks, order, last):
    folder, held = chunks
    data = open_trajectories(folder, split="test", split_counts=(8, 2, 2), chunk_order=order)
    assert np.array_equal(data.stack(), held[last])
    assert len(open_trajectories(folder, split="train", split_counts=(8, 2, 2), chunk_order=order)) == 8


def test_splits_do_not_overlap_and_cover_the_set(tmp_path, chunks):
    folder, held = chunks
    parts = [open_trajectories(folder, split=split, split_counts=(7, 2, 3)) for split in ("train", "valid", "test")]
    assert np.array_equal(torch.cat([part.stack() for part in parts]), held)
    path = tmp_path / "2D_CFD_periodic_Train.hdf5"
    density = write_pdebench(path, 20)["density"]
    tests, trains = (open_trajectories(path, split=split) for split in ("test", "train"))
    assert np.array_equal(torch.cat([tests.stack(), trains.stack()])[:, :, 2], density) and len(tests) == 2


def test_published_counts_are_not_taken_for_files_of_another_size(chunks):
    folder, _ = chunks
    with pytest.raises(DataError, match=r"12 trajectories, but .* train 9640 \+ valid 120 \+ test 240 = 10000.*split_counts="):
        open_trajectories(folder, split="test")
    with pytest.raises(DataError, match=r"train 8 \+ valid 2 \+ test 1 = 11"):
        open_trajectories(folder, split="test", split_counts=(8, 2, 1))
    with pytest.raises(DataError, match="split valid holds no trajectory"):
        open_trajectories(folder, split="valid", split_counts=(10, 0, 2))
    with pytest.raises(ArgumentError, match="split is 'reward'; pdegym data have train, valid, test"):
        open_trajectories(folder, split="reward")
    assert len(open_trajectories(folder)) == 12


def test_chunks_that_are_missing_or_foreign_are_named(chunks):
    folder, _ = chunks
    with pytest.raises(ArgumentError, match="chunk_order is 'random'; it must be one of 'numeric', 'lexicographic'"):
        open_trajectories(folder, chunk_order="random")
    (folder / "data_7.nc").rename(folder / "aside")
    with pytest.raises(DataError, match=r"lacks data_7\.nc before data_11\.nc"):
        open_trajectories(folder)
    shutil.copy(folder / "aside", folder / "data_7.nc")
    shutil.copy(folder / "aside", folder / "CE-KH.nc")
    with pytest.raises(DataError, match=r"expected the chunks of one set.*a folder of its own"):
        open_trajectories(folder)
    assert len(open_trajectories(folder / "data_7.nc")) == 1  # a chunk alone is a file like any other


@pytest.mark.parametrize("kind", ["well", "pdegym", "pdebench"])
def test_a_format_is_recognised_or_taken_at_its_word(tmp_path, kind):
    path = tmp_path / "periodic_x.h5"
    {"well": write_the_well, "pdegym": write_pdegym, "pdebench": write_pdebench}[kind](path, 2)
    assert type(open_trajectories(path).files[0]) is type(open_trajectories(path, kind).files[0])
    for other in {"well", "pdegym", "pdebench"} - {kind}:
        with pytest.raises(DataError, match=f"found .*; it looks like format={kind}"):
            open_trajectories(path, other)
    with pytest.raises(ArgumentError, match="format is 'netcdf'"):
        open_trajectories(path, "netcdf")


def test_a_file_of_no_format_names_what_it_holds_and_what_was_expected(tmp_path):
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["tensor"] = np.zeros((2, 3, 4), dtype=np.float32)
    with pytest.raises(DataError, match=r"holds tensor \[2, 3, 4\]; expected t0_fields .* data or solution .* density"):
        open_trajectories(path)
    with pytest.raises(DataError, match=r"density \[sample, time, x\] was expected; found tensor \[2, 3, 4\]"):
        open_trajectories(path, "pdebench")
    with pytest.raises(DataError, match=r"no \.nc file in"):
        open_trajectories(tmp_path, "pdegym")
    for kind in ("auto", "pdegym", "pdebench"):
        with pytest.raises(DataError, match=r"CE-KH.nc does not exist; give a data file or a folder that holds some"):
            open_trajectories(tmp_path / "CE-KH.nc", kind)


def test_other_axes_and_names_are_named(tmp_path):
    path = tmp_path / "a.nc"
    for axes in (("sample", "channel", "time", "x", "y"), ("sample", "channel", "t", "x", "y")):
        write_pdegym(path, 1, axes=axes)
        with pytest.raises(DataError, match=f"axes {', '.join(axes)}; expected sample, time, channel, x, y"):
            PDEGymFile(path)
    write_pdegym(path, 1, axes=[f"dim_{n}" for n in range(5)])
    assert len(PDEGymFile(path)) == 1  # names of which none is ours say nothing
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros((2, 5, 8, 8), dtype=np.float32)
    with pytest.raises(DataError, match=r"data \[sample, time, 5, x, y\] .* found data \[2, 5, 8, 8\]"):
        PDEGymFile(path)
    with h5py.File(path, "w") as file:
        file["data"] = np.zeros((0, 5, 5, 8, 8), dtype=np.float32)
    with pytest.raises(DataError, match="holds no trajectory"):
        PDEGymFile(path)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("Vy", None, r"Vy \[2, 5, 8, 8\] was expected; found .*Vx \[2, 5, 8, 8\]"),
        ("Vx", np.zeros((2, 5, 8, 9), dtype=np.float32), r"Vx \[2, 5, 8, 8\] .* found Vx \[2, 5, 8, 9\]"),
        ("pressure", np.zeros((2, 5, 8, 8), dtype=np.int32), "floating-point .* found pressure .* of int32"),
        ("x-coordinate", np.linspace(0, 1, 9), "x-coordinate has 9 entries; the fields have 8 cells"),
        ("y-coordinate", np.arange(8.0) ** 2, "y-coordinate runs from 0 to 49 in steps of 1 to 13"),
        ("y-coordinate", None, r"y-coordinate \[cells\] was expected; found .*x-coordinate"),
        ("t-coordinate", np.arange(9.0), "t-coordinate has 9 entries for 5 frames; expected 5, or 6"),
        ("t-coordinate", np.zeros(6), "t-coordinate does not increase"),
    ],
)
def test_what_is_wrong_in_a_pdebench_file_is_named(tmp_path, name, replacement, message):
    path = tmp_path / "2D_periodic.hdf5"
    write_pdebench(path, 2)
    with h5py.File(path, "a") as file:
        del file[name]
        if replacement is not None:
            file[name] = replacement
    with pytest.raises(DataError, match=message):
        PDEBenchFile(path)


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("x", None, r"dimensions/x \[cells\] was expected; found .*dimensions/y \[8\]"),
        ("x", np.linspace(0, 1, 9), "dimensions/x has 9 entries; the fields have 8 cells"),
        ("y", np.linspace(0, 1, 8) ** 2, "dimensions/y runs from 0 to 1 in steps of"),
        ("time", None, r"dimensions/time \[time\] was expected; found"),
        ("time", np.zeros(5), "dimensions/time does not increase"),
    ],
)
def test_coordinates_of_the_well_are_held_against_the_fields(tmp_path, name, replacement, message):
    write_the_well(tmp_path / "a.hdf5", 2)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file[f"dimensions/{name}"]
        if replacement is not None:
            file[f"dimensions/{name}"] = replacement
    with pytest.raises(DataError, match=message):
        TrajectoryFile(tmp_path / "a.hdf5")


def test_a_gamma_that_fits_neither_the_file_nor_its_trajectories_is_refused(tmp_path):
    write_the_well(tmp_path / "a.hdf5", 3)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["scalars/gamma"]
        file["scalars/gamma"] = np.float32([1.3, 1.4])
    with pytest.raises(DataError, match=r"scalars/gamma has shape \(2,\); expected one number, or one per trajectory \(3,\)"):
        TrajectoryFile(tmp_path / "a.hdf5")


def test_a_fifth_channel_that_is_no_energy_is_refused_and_may_be_left_out(tmp_path):
    path = tmp_path / "scaled.nc"
    held = write_pdegym(path, 2)
    with h5py.File(path, "a") as file:
        file["data"][:, :, 4] *= 0.4
    with pytest.raises(DataError, match=r"cannot be the total energy: its mean .* give 5\..*energy=pressure"):
        PDEGymFile(path)
    data = open_trajectories(path, energy="pressure").converted(StateSpec.euler2d())
    assert np.allclose(data[0][:, 3], held[0, :, 4], rtol=1e-6)


def test_an_option_of_another_format_is_refused(tmp_path):
    write_the_well(tmp_path / "a.hdf5", 1)
    write_pdebench(tmp_path / "periodic.hdf5", 1)
    for name, kind, option in (
        ("a", "well", {"gamma": 1.5}),
        ("a", "well", {"chunk_order": "lexicographic"}),
        ("periodic", "pdebench", {"energy": "pressure"}),
    ):
        ((key, value),) = option.items()
        with pytest.raises(ArgumentError, match=rf"{key} is {value!r}; .* is of format {kind}, which leaves .* open: leave it out"):
            open_trajectories(tmp_path / f"{name}.hdf5", **option)
    with pytest.raises(ArgumentError, match=r"gamma is 0\.9; it must be above 1"):
        open_trajectories(tmp_path / "a.hdf5", gamma=0.9)
    with pytest.raises(ArgumentError, match=r"split_counts is \[1, 2\]; give three numbers"):
        open_trajectories(tmp_path / "a.hdf5", split_counts=(1, 2))


@pytest.mark.parametrize("write", [write_the_well, write_pdegym, write_pdebench])
def test_a_truncated_file_is_one_clear_error(tmp_path, write):
    path = tmp_path / "periodic.h5"
    write(path, 2)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="truncated or no HDF5 file"):
        open_trajectories(path)


def first_frames(reader) -> bytes:
    return reader.read(1, 0, 2).numpy().tobytes()


@pytest.mark.parametrize("write", [write_the_well, write_pdegym, write_pdebench])
def test_workers_read_the_same_through_files_of_their_own(tmp_path, write):
    path = tmp_path / "periodic.h5"
    write(path, 2)
    file = open_trajectories(path).files[0]
    assert pickle.loads(pickle.dumps(file)).read(1, 0, 2).numpy().tobytes() == first_frames(file)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert set(pool.map(first_frames, [file] * 4)) == {first_frames(file)}
    file.close()
    assert first_frames(file)
    for wrong in ((2, 0, 1), (0, 0, 9), (0, 3, 2)):
        with pytest.raises(IndexError, match="holds 2 of 5 frames"):
            file.read(*wrong)


def test_opening_reads_no_trajectory(tmp_path, monkeypatch):
    for write, name in ((write_the_well, "a.hdf5"), (write_pdebench, "periodic.hdf5")):
        write(tmp_path / name, 2)
        monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda *a: pytest.fail("opening read values"))
        open_trajectories(tmp_path / name)
        monkeypatch.undo()


def test_windows_and_statistics_come_in_the_channels_asked_for(tmp_path):
    held = write_pdegym(tmp_path / "a.nc", 3)
    data = open_trajectories(tmp_path / "a.nc").converted(StateSpec.euler2d())
    windows = WindowSampler(data, length=3, seed=1).batch(0, 4)
    assert windows.shape == (4, 3, 4, 8, 8)
    found = field_statistics(data)
    assert found.mean[3] == pytest.approx(held[:, :, 4].mean(dtype=np.float64), rel=1e-6)
    assert found.mean[1] == pytest.approx((held[:, :, 0] * held[:, :, 1]).mean(dtype=np.float64), rel=1e-5)


def test_files_of_another_kind_are_not_mixed(tmp_path):
    for name, change in (("a_periodic", {}), ("b_periodic", {"shape": (8, 4)}), ("c_trans", {}), ("d_periodic", {})):
        write_pdebench(tmp_path / f"{name}.hdf5", 1, **change)
    with h5py.File(tmp_path / "d_periodic.hdf5", "a") as file:
        file.attrs["eta"] = 0.1
    for name, message in (("b_periodic", "grid"), ("c_trans", "periodic axes"), ("d_periodic", r"eta 0\.1; .* has 0\.01")):
        with pytest.raises(DataError, match=message):
            open_trajectories([tmp_path / "a_periodic.hdf5", tmp_path / f"{name}.hdf5"])
