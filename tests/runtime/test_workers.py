"""Worker processes: results in order, errors of theirs here, and an end whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from functools import partial

import pytest

from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.workers import Worker, WorkerError, answers, end, in_order


class Adder:
    def __init__(self, to: int) -> None:
        if to < 0:
            raise DataError("no negative numbers here")
        self.to, self.calls = to, 0

    def add(self, n: int, wait: float = 0.0) -> tuple[int, int]:
        time.sleep(wait)
        if n == 13:
            raise ArgumentError("13 is unlucky")
        if n == 14:
            os._exit(5)
        if n == 15:
            raise ZeroDivisionError("a bug")
        return self.to + n, os.getpid()


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    before = set(multiprocessing.active_children())
    held = [Worker(partial(Adder, 100), f"adder {i}", "which adds") for i in range(2)]
    answers(held)
    yield held
    end(held)
    assert set(multiprocessing.active_children()) == before


def test_results_come_in_the_order_of_the_calls_whoever_is_faster(workers):
    found = list(in_order(workers, "add", [(n, 0.2 if n == 0 else 0.0) for n in range(8)]))
    assert [value for value, _ in found] == [100 + n for n in range(8)]
    processes = [pid for _, pid in found]
    assert set(processes) == {worker.pid for worker in workers} and processes.count(processes[0]) < 4, "the other one did not wait"
    assert list(in_order(workers, "add", [])) == []


def test_an_error_of_ours_is_raised_here_and_the_worker_goes_on(workers):
    for worker in workers:
        worker.ask("add", 13)
    with pytest.raises(ArgumentError, match="13 is unlucky"):
        answers(workers)
    assert [value for value, _ in in_order(workers, "add", [(1,), (2,)])] == [101, 102]


@pytest.mark.parametrize(
    ("n", "how"), [(14, r"ended with status 5; the others"), (15, r"ended with status 1 \(its own message stands above\); the")]
)
def test_a_worker_that_ends_is_named(workers, n, how):
    with pytest.raises(WorkerError, match=rf"adder 1 \(process {workers[1].pid}, which adds\) {how}.*: start again"):
        list(in_order(workers, "add", [(n,), (1,)]))


def test_an_object_that_cannot_be_made_is_told():
    worker = Worker(partial(Adder, -1), "adder", "which adds")
    with pytest.raises(DataError, match="no negative numbers here"):
        answers([worker])
    end([worker])
    with pytest.raises(ArgumentError, match="make cannot be sent to a worker process"):
        Worker(lambda: Adder(1), "adder", "which adds")
