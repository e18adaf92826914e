"""Collecting with worker processes: the same files, and whole ones whoever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.simulators import needs_dm_control
from ttcfast.data.replay_shard import ReplayShard
from ttcfast.pwm.collect import CollectConfig, CollectResult, collect
from ttcfast.runtime.workers import WorkerError

pytestmark = needs_dm_control

SMALL: dict[str, Any] = {"episodes": 4, "per_shard": 2, "action_repeat": 50, "controllers": {"random": 1}}
FIRST = "cartpole-swingup_0000.pt"


def record(out: Path, **changes: Any) -> CollectResult:
    return collect(CollectConfig(out=str(out), **{**SMALL, **changes}))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> list[Path]:
    return record(tmp_path_factory.mktemp("recorded"), exploring=3, exploring_steps=7).files


def same(files: list[Path], others: list[Path]) -> bool:
    return all(a.name == b.name and a.read_bytes() == b.read_bytes() for a, b in zip(files, others, strict=True))


def test_workers_record_the_same_files(recorded, tmp_path):
    numbers = ("0000", "0001", "exploring_0000", "exploring_0001")
    assert [file.name for file in recorded] == [f"cartpole-swingup_{n}.pt" for n in numbers]
    assert same(record(tmp_path / "workers", processes=2, exploring=3, exploring_steps=7).files, recorded)
    assert same(record(tmp_path / "without").files, recorded[:2]), "exploring episodes change nothing of the others"


def test_a_killed_collector_leaves_whole_shards_and_no_worker_and_goes_on(recorded, tmp_path):
    out, script = tmp_path / "out", tmp_path / "script.py"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    from ttcfast.pwm.collect import CollectConfig, collect\n"
        f"    collect(CollectConfig(out={str(out)!r}, processes=2, **{ {**SMALL, 'episodes': 4000} }))\n"
    )
    run = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    wait_for(lambda: (out / FIRST).exists() or run.poll() is not None)
    children = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.kill()
    run.wait()
    wait_for(lambda: not any(runs(pid) for pid in children))
    assert len(children) >= 2, "the workers ended by themselves"
    files = sorted(out.glob("[!.]*.pt"))
    assert 1 <= len(files) < 2000 and [len(ReplayShard(file)) for file in files] == [2] * len(files)
    written = (out / FIRST).stat().st_mtime_ns
    assert same(record(out).files, recorded[:2]) and (out / FIRST).stat().st_mtime_ns == written


def test_a_killed_worker_is_told_and_leaves_no_half_shard(recorded, tmp_path):
    others = set(multiprocessing.active_children())

    def kill() -> None:
        wait_for((tmp_path / FIRST).exists)
        victim = next(p for p in multiprocessing.active_children() if p not in others)
        os.kill(victim.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    told = r"worker [12] of 2 \(process \d+, which records episodes\) was killed by signal 9; .*: run again, which goes on at the first"
    with pytest.raises(WorkerError, match=told):
        record(tmp_path, episodes=4000, processes=2)
    killer.join()
    assert set(multiprocessing.active_children()) <= others
    files = sorted(tmp_path.glob("[!.]*.pt"))
    assert 1 <= len(files) < 2000 and [len(ReplayShard(file)) for file in files] == [2] * len(files)
    assert same(record(tmp_path).files, recorded[:2])


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
