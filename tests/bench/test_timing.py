"""What ``measure`` promises, on a clock that the peers themselves move: nothing here depends on how fast the machine is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from bench.clocks import HostClock
from bench.rows import GATE_FAILED, OK, PEER_FAILED, Row
from bench.timing import Case, measure, percentile

TICK = 1e-3  # what every sample costs beside the peer, so that the ceilings, which do not move this clock, take a time too


class FakeClock(HostClock):
    """Every peer made by ``taking`` moves it; keeps who was sampled, in order."""

    def __init__(self) -> None:
        super().__init__(lambda: self.time)
        self.time = 0.0
        self.sampled: list[Any] = []
        self.loops: list[int] = []
        self.capturable: Sequence[Any] = ()

    def taking(self, *seconds: float) -> Callable[[], None]:
        turns = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            self.time += next(turns)

        return run

    def sample(self, run: Callable[[], Any], loops: int) -> float:
        self.sampled.append(run)
        self.loops.append(loops)
        return super().sample(run, loops)

    def graph_of(self, run: Callable[[], Any]) -> tuple[Callable[[], Any] | None, str]:
        return (self.taking(1e-2), "") if run in self.capturable else (None, "not capturable: it reads a result")


def case(peers: dict[str, Callable[[], Any]], check: Callable[[], None] = lambda: None, bytes_moved: int | None = None) -> Case:
    return Case("group", "case", "[1]", "float32", peers, next(iter(peers)), check, bytes_moved, "a note")


def by_peer(rows: list[Row]) -> dict[str, Row]:
    return {row.peer: row for row in rows}


def test_a_gate_that_says_no_stops_the_timing():
    clock = FakeClock()

    def disagree() -> None:
        raise AssertionError("peer b is wrong\nby 0.1")

    (row,) = measure(case({"a": clock.taking(1.0), "b": clock.taking(1.0)}, disagree), clock=clock)
    assert (row.status, row.error) == (GATE_FAILED, "AssertionError: peer b is wrong by 0.1")
    assert clock.time == 0 and not clock.sampled
    assert row.p50_us is None and row.ratio is None and row.rounds is None


def test_peers_take_turns_and_each_round_starts_one_further():
    clock = FakeClock()
    peers = {name: clock.taking(1.0) for name in "abc"}
    measure(case(peers), rounds=4, clock=clock)
    name_of = {run: name for name, run in peers.items()}
    order = "".join(name_of[run] for run in clock.sampled)
    assert order == "aaabbbccc" + "abc" + "bca" + "cab" + "abc"  # three samples of each to warm up and to choose the loops


def test_the_check_comes_before_the_first_call():
    clock, seen = FakeClock(), []

    def run() -> None:
        clock.time += 1
        seen.append("run")

    measure(case({"a": run}, lambda: seen.append("check")), rounds=1, clock=clock)
    assert seen == ["check", *["run"] * 4]


def test_percentiles_ratios_and_provenance_are_of_the_samples():
    clock = FakeClock()
    ours = clock.taking(9, 9, 9, 0.1, 0.5, 0.2, 0.3, 0.4)  # three to warm up, then five rounds
    rows = by_peer(measure(case({"ours": ours, "slow": clock.taking(0.9)}), rounds=5, clock=clock))
    assert [rows["ours"].p20_us, rows["ours"].p50_us, rows["ours"].p80_us] == pytest.approx([0.18e6, 0.3e6, 0.42e6])
    assert rows["ours"].ratio == 1 and rows["slow"].ratio == pytest.approx(3)
    for row in rows.values():
        assert (row.status, row.rounds, row.loops, row.threads, row.note) == (OK, 5, 1, 1, "a note")
        assert row.torch == torch.__version__ and row.python and row.cpu and row.date.endswith("+00:00")


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (20, 1.8), (50, 3), (80, 4.2), (100, 5)])
def test_percentile_interpolates(percent, value):
    assert percentile([5, 1, 4, 2, 3], percent) == pytest.approx(value)
    assert percentile([7], percent) == 7


def test_short_calls_fill_a_sample_and_long_ones_are_called_once():
    clock = FakeClock()
    rows = by_peer(measure(case({"short": clock.taking(1e-4), "long": clock.taking(1)}), rounds=2, least_seconds=0.02, clock=clock))
    assert 200 <= rows["short"].loops <= 201 and rows["long"].loops == 1
    assert rows["short"].p50_us == pytest.approx(100) and max(clock.loops) == rows["short"].loops


def test_a_peer_that_raises_is_told_and_the_others_are_timed():
    clock = FakeClock()

    def fails() -> None:
        raise MemoryError("no memory")

    rows = by_peer(measure(case({"a": clock.taking(1.0), "b": fails}), rounds=2, clock=clock))
    assert (rows["b"].status, rows["b"].error, rows["b"].p50_us) == (PEER_FAILED, "MemoryError: no memory", None)
    assert rows["a"].status == OK and rows["a"].p50_us == pytest.approx(1e6)
    rows = by_peer(measure(case({"b": fails, "a": clock.taking(1.0)}), rounds=2, clock=clock))
    assert rows["a"].status == OK and rows["a"].ratio is None  # there is nothing of ours to divide by


def test_ceilings_of_the_same_rounds_give_the_shares():
    class Ticking(FakeClock):
        def sample(self, run, loops):
            return super().sample(run, loops) + TICK

    clock = Ticking()
    size = 4 * 1000
    rows = by_peer(measure(case({"ours": clock.taking(3 * TICK), "b": clock.taking(7 * TICK)}, bytes_moved=size), rounds=3, clock=clock))
    ours = rows["ours"]
    assert ours.gb_per_s == pytest.approx(size / (4 * TICK) / 1e9)
    # One ceiling call takes a tick: it reads `size`, or reads it and writes it.
    assert (ours.read_gb_per_s, ours.copy_gb_per_s) == pytest.approx((size / TICK / 1e9, 2 * size / TICK / 1e9))
    assert (ours.share_of_read, ours.share_of_copy) == pytest.approx((1 / 4, 1 / 8))
    assert rows["b"].share_of_read == pytest.approx(1 / 8)
    assert set(rows) == {"ours", "b"}


def test_a_graph_fills_its_columns_and_one_that_cannot_be_captured_leaves_them_empty():
    clock = FakeClock()
    ours, b, c = clock.taking(1.0), clock.taking(1.0), clock.taking(1.0)
    clock.capturable = [ours, b]
    rows = by_peer(measure(case({"ours": ours, "b": b, "c": c}), rounds=3, clock=clock))
    assert rows["b"].graph_p50_us == pytest.approx(1e4) and rows["b"].graph_hot_us == pytest.approx(1e4)
    assert rows["b"].graph_ratio == rows["b"].graph_hot_ratio == pytest.approx(1) and rows["b"].graph_note == ""
    assert rows["c"].graph_p50_us is rows["c"].graph_ratio is rows["c"].graph_hot_us is rows["c"].graph_hot_ratio is None
    assert rows["c"].graph_note == "not capturable: it reads a result" and rows["c"].p50_us == pytest.approx(1e6)


def test_threads_hold_for_check_and_peers_and_are_put_back():
    clock, seen = FakeClock(), set()
    before = torch.get_num_threads()

    def look() -> None:
        seen.add(torch.get_num_threads())
        clock.time += 1

    measure(case({"a": look}, look), rounds=1, threads=before + 1, clock=clock)
    assert seen == {before + 1} and torch.get_num_threads() == before


def test_the_host_clock_averages_its_calls():
    times = iter([10.0, 16.0])
    called: list[int] = []
    assert HostClock(lambda: next(times)).sample(lambda: called.append(1), 3) == 2.0
    assert len(called) == 3


def test_ours_must_be_among_the_peers():
    with pytest.raises(ValueError, match="ours is 'x'; case g/n has the peers a"):
        Case("g", "n", "", "", {"a": lambda: None}, "x", lambda: None)
    with pytest.raises(ValueError, match="rounds is 0 and threads is 1"):
        measure(case({"a": lambda: None}), rounds=0)
