"""The fuzzer finds what is planted: a wrong answer, an unclear error, a crash, a hang; and says how to have each again."""

from __future__ import annotations

import re
import sys

import pytest

import tests.fuzz.__main__ as fuzz

BREAK = """
import os, sys, time
import torch
import tests.fuzz.ops as checks
from tests.fuzz.__main__ import main
{fault}
sys.exit(main(sys.argv[1:]))
"""
WRONG = """
topk = checks.ops.topk
def off_by_one(scores, k, ids=None, backend="auto"):
    values, indices = topk(scores, k, ids=ids, backend=backend)
    return values, indices if backend == "reference" else indices.clamp(max=11)
checks.ops.topk = off_by_one
"""
UNCLEAR = """
def deep(z, k1, dt, group, backend):
    if not isinstance(dt, float) or not isinstance(z, torch.Tensor):
        return [][1]
    return z + dt * k1
checks.ops.heun_predict = checks.ops.heun_correct = lambda z, k1, dt, group, backend, k2=0.0: deep(z, k1, dt, group, backend)
checks.same = checks.near = lambda *_: None
"""
CRASH = """
count = iter(range(1000))
def aborts(draw):
    if next(count) == 3:
        print("the end", file=sys.stderr, flush=True)
        os.abort()
checks.OPS["normal"] = aborts
"""
KILLED = """
import signal
checks.OPS["normal"] = lambda draw: os.kill(os.getpid(), signal.SIGKILL)
"""
HANG = """
checks.OPS["normal"] = lambda draw: time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("op", "fault", "told"),
    [
        ("topk", WRONG, r"FAILED topk: Wrong in ops.py:\d+: indices of \w+: \d+\.0 at \(\d+, \d+\), expected"),
        ("heun", UNCLEAR, r"FAILED heun: IndexError in <string>:\d+: list index out of range"),
        ("normal", KILLED, r"FAILED normal: the process crashed or was killed \(status -9\)"),
        ("normal", HANG, r"FAILED normal: the process hung \(status -9\)"),
    ],
    ids=["wrong", "unclear", "killed", "hang"],
)
def test_a_planted_fault_is_found(monkeypatch, capsys, op, fault, told):
    monkeypatch.setattr(fuzz, "CHILD", [sys.executable, "-c", BREAK.format(fault=fault)])
    monkeypatch.setattr(fuzz, "MOST_FAILURES", 1)
    monkeypatch.setattr(fuzz, "HANGS", 10)
    assert fuzz.main(["--seconds", "300", "--seed", "7", "--op", op]) == 1
    printed = capsys.readouterr().out
    assert re.search(told, printed), printed
    assert re.search(rf"again: python -m tests.fuzz --seed 7 --op {op} --case \d+\n", printed)
    assert re.search(r"\d+ calls, 1 failures \(seed 7\)", printed)


def test_after_a_crash_another_child_goes_on_behind_it(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "CHILD", [sys.executable, "-c", BREAK.format(fault=CRASH)])
    monkeypatch.setattr(fuzz, "MOST_FAILURES", 2)
    assert fuzz.main(["--seconds", "300", "--seed", "7", "--op", "normal"]) == 1
    printed = capsys.readouterr().out
    assert re.findall(r"--case (\d+)", printed) == ["3", "7"]
    told = r"FAILED normal: the process crashed or was killed \(status -6\): .*the end(.|\n)*Fatal Python error: Aborted"
    assert re.search(told, printed), printed


def test_sound_operations_pass_and_one_case_can_be_had_again(capsys):
    assert fuzz.main(["--seconds", "2", "--seed", "5"]) == 0
    found = re.search(r"(\d+) calls, 0 failures \(seed 5\)", capsys.readouterr().out)
    assert found and int(found[1]) > 1
    assert fuzz.main(["--seed", "5", "--op", "topk", "--case", "1"]) == 0
    assert capsys.readouterr().out == "topk 1: no failure\n"


def test_a_child_that_never_starts_is_no_success():
    with pytest.raises(SystemExit, match=r"status 2 before its first case(.|\n)*--op is 'nothing'; the operations are arm, arm_fields"):
        fuzz.main(["--seconds", "30", "--op", "nothing"])
