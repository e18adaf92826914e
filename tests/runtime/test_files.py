import errno
import json
import os
import stat
import subprocess
import sys
import threading

import h5py
import numpy as np
import pytest
import torch

from ttcfast.runtime import files
from ttcfast.runtime.errors import OutputError
from ttcfast.runtime.files import append, atomic_path, atomic_write, output_folder, write_csv, write_json


def test_a_file_appears_whole_with_the_permissions_of_any_other_file(tmp_path):
    with atomic_write(tmp_path / "new" / "a.txt") as file:
        file.write("température\n")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_bytes() == "température\n".encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "new" / "a.txt").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(failure), atomic_write(path) as file:
        file.write("half")
        raise failure
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write(tmp_path / "link.txt") as file:
        file.write("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_full_disk_is_one_line_and_the_device_survives():
    with (
        pytest.raises(OutputError, match=r"^cannot write /dev/full: No space left on device; free some space"),
        atomic_write("/dev/full") as file,
    ):
        file.write("x")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    with pytest.raises(OutputError, match="/dev/full"):
        append("/dev/full", "x")


def test_a_full_disk_told_only_in_a_message_is_understood(tmp_path):
    with pytest.raises(OutputError, match="No space left"), atomic_path(tmp_path / "a.hdf5"):
        raise OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')")


def test_an_error_of_another_file_keeps_its_kind(tmp_path):
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "an input that may not be read")


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_an_unwritable_folder_is_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to folder .*; give another one"):
        output_folder(tmp_path / place)
    with pytest.raises(OutputError), atomic_write("/dev/null/below/a.txt"):
        pass


def test_a_folder_in_the_files_place_is_told(tmp_path):
    with pytest.raises(OutputError, match="it is a folder"), atomic_write(tmp_path):
        pass


def test_a_writer_that_wants_a_path_keeps_the_suffix(tmp_path):
    with atomic_path(tmp_path / "data.hdf5") as place:
        assert place.suffix == ".hdf5"
        with h5py.File(place, "w") as file:
            file["x"] = np.arange(3)
    with h5py.File(tmp_path / "data.hdf5") as file:
        assert list(file["x"]) == [0, 1, 2]
    assert os.listdir(tmp_path) == ["data.hdf5"]


def test_json_is_strict_and_takes_tensors_paths_and_non_finite_numbers(tmp_path):
    write_json(tmp_path / "a.json", {"x": torch.tensor([1.0, float("nan")]), "n": np.float64("inf"), "p": tmp_path, 3: (1, 2)})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [1.0, None], "n": None, "p": str(tmp_path), "3": [1, 2]}
    assert "NaN" not in text and "Infinity" not in text


def test_csv_has_the_union_of_the_columns(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1, "b": "x,y"}, {"c": 2.5}])
    assert (tmp_path / "a.csv").read_text() == 'a,b,c\n1,"x,y",\n,,2.5\n'


def test_threads_that_write_one_file_never_show_a_broken_one(tmp_path):
    wrong: list[BaseException] = []

    def write(numbers: int) -> None:
        try:
            for _ in range(40):
                write_json(tmp_path / "a.json", {"v": list(range(numbers))})
                assert json.loads((tmp_path / "a.json").read_text())["v"][:3] == [0, 1, 2]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=write, args=(numbers,)) for numbers in (3, 3000, 10, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and os.listdir(tmp_path) == ["a.json"]


def test_names_do_not_depend_on_the_process_number(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in two containers
    with atomic_path(tmp_path / "a.txt") as one, atomic_path(tmp_path / "a.txt") as other:
        assert one != other and one.is_file() and other.is_file()
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.txt").read_text() == "one"


@pytest.mark.parametrize(
    ("umask", "before", "after"), [(0o002, None, 0o664), (0o077, None, 0o600), (0o022, 0o664, 0o664), (0o022, 0o600, 0o600)]
)
def test_permissions_are_kept(tmp_path, umask, before, after):
    path = tmp_path / "a.txt"
    if before is not None:
        path.touch()
        path.chmod(before)
    old = os.umask(umask)
    try:
        with atomic_write(path) as file:
            file.write("new")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == after and path.read_text() == "new"


KILLED = """
import os, signal, sys
from ttcfast.runtime.files import atomic_path
with atomic_path(sys.argv[1]) as place:
    place.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_is_not(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a.txt")], timeout=120, check=False)
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".partial.txt") and not (tmp_path / "a.txt").exists()
    (tmp_path / ".notes.partial.txt").touch()  # not a name of ours
    with atomic_path(tmp_path / "b.txt") as living:
        living.write_text("b")
        monkeypatch.setattr(files, "_swept", set())  # as another process would find the folder
        with atomic_write(tmp_path / "c.txt") as file:
            file.write("c")
        assert living.exists()
    assert sorted(os.listdir(tmp_path)) == [".notes.partial.txt", "b.txt", "c.txt"]


def test_a_long_name_leaves_room_for_the_temporary_one(tmp_path):
    name = "é" * 120 + ".json"
    write_json(tmp_path / name, 1)
    assert os.listdir(tmp_path) == [name]


def test_room_is_set_aside(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 20)
    files.reserve(tmp_path / "a")
    found = (tmp_path / "a").stat()
    assert found.st_size == 1 << 20 and found.st_blocks * 512 >= 1 << 20
