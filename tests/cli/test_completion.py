"""Shell completion: commands, keys with what follows them, values of groups, and what bash itself makes of it."""

import os
import shutil
import subprocess
import sys

import pytest

from ttcfast.cli.commands import COMMANDS
from ttcfast.cli.completion import INSTALL, candidates
from ttcfast.cli.main import main


def test_commands_are_completed():
    assert candidates("ttcfast ") == [f"{name} " for name in (*COMMANDS, "help")]
    assert candidates("ttcfast gen") == ["generate "] and candidates("ttcfast nothing ") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ttcfast train_fm ste", ["steps="]),
        ("ttcfast train_fm steps=3 arch", ["architecture="]),
        ("ttcfast train_fm fno.wi", ["fno.width="]),
        ("ttcfast train_fm fn", ["fno."]),
        ("ttcfast collect ta", ["tasks="]),  # a list takes a value as a whole
        ("ttcfast train_policy agent=", ["agent=control ", "agent=pwm "]),
        ("ttcfast train_fm ag", []),  # a group of other commands
        ("ttcfast train_fm hyd", []),
        ("ttcfast train_fm --multirun hyd", ["hydra/launcher="]),
        ("ttcfast train_fm --mu", ["--multirun "]),
        ("ttcfast info ", []),
    ],
)
def test_keys_are_completed_as_they_are_written(line, expected):
    assert candidates(line) == expected


def test_what_stands_before_the_shells_word_is_left_out():
    assert candidates("ttcfast train_policy agent=co", "co") == ["control "]
    assert candidates("ttcfast train_fm fno.wi", "fno.wi") == ["fno.width="]


def test_the_line_for_the_shell_is_printed_and_a_wrong_line_prints_nothing(monkeypatch, capsys):
    assert main(["completion"]) == 0
    assert capsys.readouterr().out == INSTALL + "\n"
    monkeypatch.setenv("COMP_LINE", "ttcfast train_fm nonsense=[ ste")
    assert main(["completion", "ttcfast", "ste", "x"]) == 0
    found = capsys.readouterr()
    assert not found.out.strip() and not found.err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_by_the_installed_line(tmp_path):
    program = tmp_path / "ttcfast"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ttcfast.cli.main "$@"\n')
    program.chmod(0o755)
    ask = "COMP_LINE='ttcfast train_f' COMP_POINT=15 ttcfast completion ttcfast train_f ttcfast"
    said = subprocess.run(
        ["bash", "-c", f"{INSTALL}\ncomplete -p ttcfast\n{ask}"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said == [INSTALL, "train_fm "]
