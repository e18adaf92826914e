from __future__ import annotations

import dataclasses

import pytest

from bench import tables
from bench.rows import PEER_FAILED, Row
from bench.targets import Target

OURS = Row("g", "big", "[1]", "float32", "ours", "ours", "ok", "", "cpu", "a CPU", 1, p50_us=2.0, ratio=1.0, share_of_read=0.6)
SLOW = dataclasses.replace(OURS, peer="slow, eager", p50_us=8.0, ratio=4.0, share_of_read=0.15)


def lines(target: Target, *rows: Row) -> list[str]:
    return [" ".join(line.split()) for line in tables.targets([target], rows).splitlines()[2:]]


def test_a_target_stands_beside_what_was_measured_for_it():
    assert lines(Target("big", "slow*", "ratio", least=3, stretch=5), OURS, SLOW) == ["ratio cpu 1 big slow* >= 3 (stretch 5) 4 met"]
    assert lines(Target("big", "slow*", "ratio", least=4.5), OURS, SLOW) == ["ratio cpu 1 big slow* >= 4.5 4 MISSED"]
    assert lines(Target("*", "", "share_of_read", least=0.55), OURS, SLOW) == ["share_of_read cpu 1 big (ours) >= 0.55 0.6 met"]
    assert lines(Target("*", "", "p50_us", most=1), OURS) == ["p50_us cpu 1 big (ours) <= 1 2 MISSED"]


@pytest.mark.parametrize(
    "target",
    [
        Target("big", "slow*", "ratio", least=3, device="cuda"),
        Target("big", "slow*", "ratio", least=3, threads=2),
        Target("small", "slow*", "ratio", least=3),
        Target("big", "slow*", "graph_ratio", least=3),
        Target("big", "*", "ratio", least=3),
    ],
)
def test_nothing_is_told_where_nothing_was_measured(target):
    rows = [OURS, dataclasses.replace(SLOW, status=PEER_FAILED)]
    assert [line.endswith("– not measured here") for line in lines(target, *rows)] == [True]


def test_a_target_has_one_bound():
    with pytest.raises(ValueError, match="give exactly one"):
        Target("big", "", "ratio")
    with pytest.raises(ValueError, match="give exactly one"):
        Target("big", "", "ratio", least=1, most=2)


def test_the_table_of_a_case_shows_times_ratios_and_trouble():
    failed = dataclasses.replace(SLOW, peer="c", status=PEER_FAILED, error="MemoryError: none")
    text = tables.measured([OURS, SLOW, failed])
    assert "ours (ours)" in text and "8.00 us" in text and "4.00x" in text and "60%" in text
    assert "PEER FAILED: c: MemoryError: none" in text and "graph" not in text
    assert tables.measured([failed]).splitlines()[1:] == ["g/big  [1] float32, a CPU, 1 thread", "  PEER FAILED: MemoryError: none"]
