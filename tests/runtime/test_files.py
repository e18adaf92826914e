import errno
import importlib
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
from ttcfast.runtime.errors import CheckpointError, DataError, OutputError, UserError
from ttcfast.runtime.files import append, atomic_path, atomic_write, entries, output_folder, require_regular, write_csv, write_json


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


def test_only_a_regular_file_is_given_to_a_reader(tmp_path, monkeypatch, in_time):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    monkeypatch.chdir(tmp_path)
    assert require_regular("file", "table", "make it") == tmp_path / "file" and require_regular("link", "table", "") == tmp_path / "link"
    for name, kind in (("pipe", "a named pipe"), (".", "a folder"), ("/dev/null", "a device")):
        with pytest.raises(DataError, match=f"^table {name} is {kind}; give a regular file$"):
            require_regular(name, "table", "make it")
    for name in ("gone", "file/below", "nul\0", "x" * 300):
        with pytest.raises(CheckpointError, match=r"^table .* does not exist; make it$"):
            require_regular(name, "table", "make it", CheckpointError)


def test_entries_are_found_by_their_ending_in_any_case(tmp_path):
    for name in ("b.HDF5", "a.h5", "c.Hdf5", "d.nc", ".e.hdf5", "hdf5"):
        (tmp_path / name).touch()
    assert [p.name for p in entries(tmp_path, ".hdf5", ".h5")] == ["a.h5", "b.HDF5", "c.Hdf5"]
    assert entries(tmp_path / "nowhere", ".h5") == [] == entries(tmp_path / "d.nc", ".h5")


def _opened(module: str, name: str):
    return lambda path: getattr(importlib.import_module(f"ttcfast.{module}"), name)(path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("log.jsonl", lambda path: _opened("runtime.logs", "read_log")(path.parent)),
        ("log.jsonl", lambda path: _opened("runtime.logs", "RunLog")(path.parent)),
        ("a.safetensors", _opened("runtime.checkpoints", "load")),
        ("a.safetensors", _opened("models", "load_surrogate")),
        ("a.safetensors", _opened("stochastic_sampling.directions", "load_directions")),
        ("model.pt", _opened("rewards.prm.sketch_files", "load_state_dict_file")),
        ("sample.pt", _opened("rewards.prm.dataset", "PRMTripletSet")),
        ("triplets.hdf5", _opened("rewards.prm.dataset", "PRMTripletSet")),
        ("list.txt", _opened("rewards.prm.dataset", "PRMTripletSet")),
        ("shard.pt", lambda path: importlib.import_module("ttcfast.data").ReplaySet.open(path)),
        ("shard.pt", lambda path: importlib.import_module("ttcfast.data").ReplaySet.open(path.parent)),
        ("fields.npz", _opened("report.fields", "read_fields")),
        ("recorded.json", lambda path: importlib.import_module("ttcfast.report.recorded").read_recorded(path, None)),
        ("a.provenance.json", lambda path: _opened("report.page.runs", "load")([path.parent])),
        ("table.csv", lambda path: _opened("report.page.runs", "load")([path.parent])),
        ("report.json", lambda path: write_json(path, {})),
        ("report.json", lambda path: append(path, "x")),
    ],
)
def test_no_reader_and_no_writer_waits_for_a_pipe(tmp_path, in_time, name, read):
    os.mkfifo(tmp_path / name)
    if name in ("table.csv", "a.provenance.json"):  # in a folder that is a run without them
        write_csv(tmp_path / "summary.csv", [{"a": 1}])
    with pytest.raises(UserError, match=f"{name}.* is a named pipe|{name}: it is a named pipe"):
        read(tmp_path / name)


def test_a_pipe_among_the_figures_is_left_out(tmp_path, in_time):
    os.mkfifo(tmp_path / "a.png")
    assert importlib.import_module("ttcfast.report.page.pictures").read_picture(tmp_path / "a.png") is None


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


def test_a_name_that_is_too_long_is_told_and_one_with_a_long_ending_is_not(tmp_path):
    path = tmp_path / f"a.{'b' * 240}"
    with atomic_write(path) as file:
        file.write("whole")
    assert path.read_text() == "whole" and len(os.listdir(tmp_path)) == 1
    with pytest.raises(OutputError, match="File name too long"), atomic_write(tmp_path / ("x" * 300)):
        pass
