"""Triplet files as any other file: whole in themselves, under any folder, however many samples they declare."""

from __future__ import annotations

import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

from tests.surrogates import drop_surrogate, euler_state, shifted
from ttcfast.rewards.prm.dataset import PRMTripletSet
from ttcfast.rewards.prm.triplets.build import build_triplets
from ttcfast.rewards.prm.triplets.file import CHECKSUM, TripletFile, checksum
from ttcfast.runtime.errors import DataError

DATA = ("frames", "errors", "picked", "step", "trajectory", "on_policy")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triplets")
    return build_triplets(drop_surrogate(), shifted(euler_state(3), 2), folder, K=4, T_prm=2, units="physical")


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copy(made, tmp_path / "a.hdf5")


def replaced(path, name: str, make) -> None:
    with h5py.File(path, "r+") as file:
        values = file[name][:]
        del file[name]
        make(file, name, values)


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_relative_path_outlives_a_change_of_folder(copied, monkeypatch, rewrite):
    if rewrite:  # as h5repack would, so that frames are read by HDF5
        replaced(copied, "frames", lambda file, name, values: file.create_dataset(name, data=values, chunks=True))
    monkeypatch.chdir(copied.parent)
    file, samples = TripletFile("a.hdf5"), PRMTripletSet("a.hdf5")
    there = TripletFile(copied).frames([1, 3])
    monkeypatch.chdir("/")
    assert torch.equal(file.frames([1, 3]), there) and torch.equal(pickle.loads(pickle.dumps(file)).frames([1, 3]), there)
    assert torch.equal(samples[3][0], there[1, 0])


@pytest.mark.parametrize("name", DATA)
def test_values_outside_the_file_are_refused(copied, name):
    def elsewhere(file, name, values):
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[...] = h5py.VirtualSource("gone.h5", "x", values.shape)
        file.create_virtual_dataset(name, layout)

    replaced(copied, name, elsewhere)
    with pytest.raises(DataError, match=f"points out of itself: {name} is a virtual data set"):
        TripletFile(copied)


def test_complex_frames_and_errors_are_refused(copied):
    replaced(copied, "frames", lambda file, name, values: file.create_dataset(name, data=values.astype(np.complex64)))
    with pytest.raises(DataError, match="frames is of complex64"):
        TripletFile(copied)


@pytest.mark.parametrize("name", ["errors", "picked", "step"])
def test_samples_declared_beyond_the_file_are_refused(copied, name):
    replaced(copied, name, lambda file, name, v: file.create_dataset(name, (10**9, *v.shape[1:]), v.dtype, chunks=(1, *v.shape[1:])))
    with pytest.raises(DataError, match=f"{name} is declared as .1000000000.*bytes of it are there|errors .*expected"):
        TripletFile(copied)


def test_upper_case_names_are_found(copied, made):
    copied.rename(copied.with_name("A.HDF5"))
    assert len(PRMTripletSet(copied.parent)) == len(TripletFile(made))


def test_triplets_of_two_layouts_are_not_mixed(made, copied):
    with h5py.File(copied, "r+") as file:
        said = file.attrs["spec"]
    assert '"gamma": 1.4' in said
    for gamma in ("1.4000001", "1.6"):  # rounding, another gas
        with h5py.File(copied, "r+") as file:
            file.attrs["spec"] = said.replace('"gamma": 1.4', f'"gamma": {gamma}')
            file.attrs.modify(CHECKSUM, checksum(file))
        if gamma != "1.6":
            assert len(PRMTripletSet([made, copied])) == 2 * len(TripletFile(made))
    with pytest.raises(DataError, match=r"a\.hdf5 was made with gamma 1\.6 and .*triplets\.hdf5 with 1\.4; give files of one"):
        PRMTripletSet([made, copied])


@pytest.mark.parametrize("state", [torch.ones(4, 8, 8, dtype=torch.complex64), torch.ones(1, 1, 1).expand(4, 30000, 30000)])
def test_complex_samples_and_values_that_are_not_there_are_refused(tmp_path, state):
    torch.save(dict.fromkeys(("state_t", "best", "med", "worst"), state), tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"a\.pt holds state_t .*, complex or without its values"):
        PRMTripletSet(tmp_path / "a.pt")
