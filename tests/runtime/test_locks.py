"""One run at a time in an output folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ttcfast.cli.commands import COMMANDS
from ttcfast.cli.main import main
from ttcfast.runtime import locks
from ttcfast.runtime.errors import OutputError
from ttcfast.runtime.locks import NAME, run_lock
from ttcfast.runtime.logs import RunLog

HOLDER = """
import os, sys, time
from ttcfast.runtime.locks import run_lock
with run_lock(sys.argv[1]):
    if len(sys.argv) > 2 and not os.fork():
        print("held", flush=True)  # by the run, whose child goes on after it is killed
        time.sleep(60)
    if len(sys.argv) < 3:
        print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another_thread(place, *, file=False) -> Iterator[None]:
    """The lock, held by a thread: for any other it is as if by another process."""
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with run_lock(place, file=file):
            ready.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert ready.wait(60)
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("child", [False, True], ids=["alone", "with a child that lives on"])
def test_the_second_run_says_who_holds_the_folder_and_a_killed_one_holds_nothing(tmp_path, child):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out"), *(["seed=1"] if child else [])]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = rf"folder .*out: another run is writing there \(-c .*; process {holder.pid} on \S+ since 20.*\); wait until it ends, or give"
        with pytest.raises(OutputError, match=said), run_lock(tmp_path / "out"):
            pass
        assert os.listdir(tmp_path / "out") == [NAME]
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with run_lock(tmp_path / "out"):
            assert str(os.getpid()) in (tmp_path / "out" / NAME).read_text()
        assert os.listdir(tmp_path / "out") == []
    finally:
        os.killpg(holder.pid, signal.SIGKILL) if child else holder.kill()
        holder.wait()


def test_functions_of_one_run_may_nest_and_logs_take_the_lock(tmp_path):
    with run_lock(tmp_path), RunLog(tmp_path) as log:
        log.log({"a": 1}, 1)
    assert sorted(os.listdir(tmp_path)) == ["log.csv", "log.jsonl"]
    with held_by_another_thread(tmp_path), pytest.raises(OutputError, match="another run is writing there"):
        RunLog(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "a": 1}\n', "the other's log is as it was"
    forgotten = RunLog(tmp_path)
    del forgotten
    with held_by_another_thread(tmp_path):
        pass


def test_files_of_one_folder_have_locks_of_their_own(tmp_path):
    with held_by_another_thread(tmp_path / "a.hdf5", file=True):
        with run_lock(tmp_path / "b.hdf5", file=True), run_lock(tmp_path):
            pass
        with pytest.raises(OutputError, match=r"file .*a\.hdf5: another run"), run_lock(tmp_path / "a.hdf5", file=True):
            pass
    assert os.listdir(tmp_path) == []


def test_the_processes_of_one_torchrun_share_the_first_ones_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with held_by_another_thread(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with run_lock(tmp_path):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(OutputError, match="another run"), run_lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def none(_: int) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "try_lock", none)
    with run_lock(tmp_path):
        pass
    assert "this file system has no locks (No locks available); see to it that no other run writes there" in caplog.text
    assert os.listdir(tmp_path) == []


def test_something_else_in_the_locks_place_is_told(tmp_path):
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match=r"\.ttcfast\.lock: .*; remove that file, or give another out="), run_lock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


NEEDED = {
    "run_ttc": ["fm.ckpt=x"],
    "ceiling": ["fm.ckpt=x"],
    "train_prm_on_policy": ["fm=x"],
    "report": ["x"],
    "fit_directions": ["data=x"],
}
SWEPT = {"run_ttc": "ttc.seed", "build_prm_data": "builder.seed", "train_wm": "split_seed", "protocol": "split_seed"}
COMMANDS_THAT_WRITE = sorted(set(COMMANDS) - {"info", "bench"})


def refused(words, place, tmp_path, capsys, *, file=False):
    with held_by_another_thread(place, file=file):
        before = sorted(tmp_path.rglob("*"))
        assert main(words) == 1
        assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{place}: another run is writing there (" in said and "give another out=" in said


@pytest.mark.parametrize("command", COMMANDS_THAT_WRITE)
def test_every_command_is_refused_before_it_writes(command, tmp_path, capsys):
    file = command == "fit_directions"
    out = tmp_path / ("out.safetensors" if file else "out")
    refused([command, *NEEDED.get(command, []), f"out={out}"], out, tmp_path, capsys, file=file)


@pytest.mark.parametrize("command", sorted(set(COMMANDS_THAT_WRITE) - {"report", "fit_directions"}))
def test_every_run_of_a_sweep_has_a_folder_and_its_lock(command, tmp_path, capsys):
    key = SWEPT.get(command, "seed")
    words = [command, *NEEDED.get(command, []), f"out={tmp_path / 'out'}", "--multirun", f"{key}=choice(1)"]
    place = tmp_path / "out" / f"{key.rpartition('.')[2]}-1"
    with held_by_another_thread(place):
        assert main(words) == 1
    assert {path.name for path in place.iterdir()} <= {".hydra", f"{command}.log", NAME}  # of Hydra's launcher, and the lock
    said = capsys.readouterr().err
    assert said.count("\nttcfast: ") == 1 and f"{place}: another run is writing there (" in said
