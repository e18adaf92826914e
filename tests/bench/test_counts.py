"""The guard of instruction counts: what it says of numbers, and that every case of the driver has one."""

from __future__ import annotations

import json
import re

import pytest

from bench import counts


def test_counts_off_by_more_than_a_twentieth_are_told_with_the_remedy():
    committed = {"same": 1000, "near": 1000, "more": 1000, "fewer": 1000, "gone": 1000}
    found = counts.differences(committed, {"same": 1000, "near": 1049, "more": 1051, "fewer": 949, "new": 7})
    assert [line.split(":")[0] for line in found] == ["more", "fewer", "gone", "new"]
    assert "5.1% more" in found[0] and "5.1% fewer" in found[1] and all(counts.RENEW in line for line in found)
    assert counts.differences(committed, committed) == []


def test_every_case_of_the_driver_has_a_committed_count():
    source = (counts.ROOT / "csrc" / "counts.cpp").read_text()
    cases = re.findall(r'^ {4}\{"([^"]+)",', source, re.MULTILINE)
    committed = json.loads(counts.COMMITTED.read_text())
    assert list(committed["counts"]) == cases and all(n > 0 for n in committed["counts"].values())
    operations = {path.name.removesuffix("_cpu.cpp") for path in (counts.ROOT / "csrc").glob("*_cpu.cpp")} - {"keyed"}
    assert {case.split(",")[0] for case in cases} == operations | {"normal", "add_noise", "keyed_dropout"}


def test_without_valgrind_a_line_says_that_nothing_was_counted(monkeypatch, capsys):
    monkeypatch.setattr(counts.shutil, "which", lambda name: None)
    assert counts.main([]) == 0 and counts.main(["--write"]) == 1
    assert "NOT counted" in capsys.readouterr().out


@pytest.mark.parametrize("change, status", [(1, 0), (1.1, 1)])
def test_the_status_follows_the_counts(change, status, monkeypatch, capsys):
    committed = json.loads(counts.COMMITTED.read_text())
    now = {case: round(change * n) for case, n in committed["counts"].items()}
    monkeypatch.setattr(counts.shutil, "which", lambda name: name)
    monkeypatch.setattr(counts, "build", lambda: None)
    monkeypatch.setattr(counts, "counts", lambda *_: (committed["compiler"], now))
    assert counts.main([]) == status
    monkeypatch.setattr(counts, "counts", lambda *_: ("another", now))
    assert counts.main([]) == 0 and "NOT compared" in capsys.readouterr().out
