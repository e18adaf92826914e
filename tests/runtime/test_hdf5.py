"""HDF5 files with care: nothing outside the file is followed, few files are open at a time, in every thread and process."""

from __future__ import annotations

import gc
import os
import resource
import socket
import threading

import h5py
import numpy as np
import pytest

from ttcfast.runtime import hdf5
from ttcfast.runtime.errors import DataError


def opened(path):
    return hdf5.open_hdf5(path, "data file", "make it")


def write(path, edit=lambda file: None):
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(3.0)
        edit(file)
    return path


def external_link(file):
    file["group/inside"] = h5py.ExternalLink("secret.h5", "/x")


def soft_link_through_an_external_one(file):
    external_link(file)
    file["soft"] = h5py.SoftLink("/group/inside")


def virtual(file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="f8")
    layout[:] = h5py.VirtualSource("missing.h5", "x", shape=(3,))
    file.create_virtual_dataset("v", layout)


def external_storage(file):
    file.create_dataset("group/raw", (3,), "f8", external=[("/etc/hostname", 0, 24)])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (external_link, "group/inside is an external link"),
        (soft_link_through_an_external_one, "is an external link"),
        (virtual, "v is a virtual data set"),
        (external_storage, "group/raw has external storage"),
    ],
)
def test_what_points_out_of_a_file_is_refused(tmp_path, edit, message):
    write(tmp_path / "secret.h5")
    with pytest.raises(DataError, match=rf"a\.h5 points out of itself: .*{message}; copy the values into the file"):
        opened(write(tmp_path / "a.h5", edit))


def test_links_inside_a_file_are_followed(tmp_path):
    def edit(file):
        file["soft"], file["dangling"], file["hard"] = h5py.SoftLink("/x"), h5py.SoftLink("/nowhere"), file["x"]

    with opened(write(tmp_path / "a.h5", edit)) as file:
        assert file["soft"][:].tolist() == file["hard"][:].tolist() == [0, 1, 2]
        assert file.get("dangling") is None


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "link.h5").symlink_to(tmp_path / "pipe.h5")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket.h5"))
    places = {"pipe.h5": "a named pipe", "link.h5": "a named pipe", "socket.h5": "a socket", "/dev/zero": "a device", ".": "a folder"}
    for name, kind in places.items():
        with pytest.raises(DataError, match=f"is {kind}; give a regular file"):
            opened(tmp_path / name)
    (tmp_path / "good.h5").symlink_to(write(tmp_path / "a.h5"))
    opened(tmp_path / "good.h5").close()


def test_a_header_declared_beyond_the_file_takes_no_memory(tmp_path):
    def edit(file):
        file.create_dataset("huge", (10**12,), "f8", chunks=(1024,))
        file.create_dataset("small", data=np.zeros(10**5), chunks=(1000,), compression="gzip", fletcher32=True)

    with opened(write(tmp_path / "a.h5", edit)) as file:
        with pytest.raises(ValueError, match=r"huge is declared as \[1000000000000\] of float64, and 0 bytes of it are there"):
            hdf5.array(file["huge"])
        assert len(hdf5.array(file["small"])) == 10**5 and hdf5.array(file["x"]).tolist() == [0, 1, 2]


class Owner:
    def __init__(self, path):
        self.path = path

    def value(self) -> float:
        with hdf5.held_open(self, lambda: opened(self.path)) as file:
            return float(file["x"][0])


def files_of(folder, count):
    for i in range(count):
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file["x"] = [float(i)]
    return [Owner(folder / f"{i}.h5") for i in range(count)]


@pytest.fixture
def few_descriptors():
    """Twenty more than are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    gc.collect()
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_than_descriptors(tmp_path, few_descriptors):
    owners = files_of(tmp_path, 80)
    assert [owner.value() for owner in owners] == list(range(80))
    assert [owner.value() for owner in reversed(owners)] == list(reversed(range(80)))


def test_no_descriptor_left_is_one_clear_error(tmp_path, few_descriptors):
    (owner,) = files_of(tmp_path, 1)
    taken = []
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            taken.append(open("/dev/null"))  # noqa: SIM115
    with pytest.raises(DataError, match=r"too many open files \(limit \d+\); ulimit -n"):
        owner.value()
    for file in taken:
        file.close()
    assert owner.value() == 0


def test_a_file_in_use_by_a_thread_is_not_closed_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_MOST", 2)
    owners, wrong = files_of(tmp_path, 6), []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(6, size=150):
            try:
                if owners[i].value() != i:
                    wrong.append(i)
                if i == 3:
                    hdf5.close(owners[i])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_goes_with_its_owner_and_a_new_owner_sees_the_new_file(tmp_path):
    (owner,) = files_of(tmp_path, 1)
    assert owner.value() == 0
    with h5py.File(tmp_path / "new.h5", "w") as file:
        file["x"] = [7.0]
    os.replace(tmp_path / "new.h5", owner.path)
    assert Owner(owner.path).value() == 7
    open_before = len(os.listdir("/proc/self/fd"))
    del owner
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < open_before
