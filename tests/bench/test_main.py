from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import groups, rows
from bench.__main__ import main
from bench.targets import Target
from bench.timing import Case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(monkeypatch):
    """A group with one case, whose gate says what the test wants."""

    def make(check=lambda: None) -> list[int]:
        threads: list[int] = []

        def cases(group: str, device: str, *, tiny: bool = False) -> Iterator[Case]:
            yield Case("fake", "one", "[2]", "float32", {"a": lambda: threads.append(torch.get_num_threads())}, "a", check, device=device)

        monkeypatch.setattr(groups, "names", lambda: ["fake"])
        monkeypatch.setattr(groups, "cases", cases)
        monkeypatch.setattr(groups, "further", lambda group, device, pattern: iter(()))
        monkeypatch.setattr(groups, "targets", lambda group: [Target("one", "", "p50_us", most=0.0)])
        return threads

    return make


QUICK = ["fake", "--quick", "--device", "cpu"]


def test_a_run_prints_and_writes_a_row_for_each_number_of_threads(fake, tmp_path, capsys):
    threads = fake()
    assert main([*QUICK, "--threads", "1", "2", "--rounds", "2", "--out", str(tmp_path)]) == 0
    found = rows.read(tmp_path / "fake-cpu.csv")
    assert [(r.threads, r.rounds, r.status, r.quick) for r in found] == [(1, 2, "ok", True), (2, 2, "ok", True)] and set(threads) == {1, 2}
    text = capsys.readouterr().out
    assert "fake/one  [2] float32" in text and "MISSED" in text and "2 rows in" in text


def test_a_failing_gate_is_a_row_and_a_status(fake, tmp_path, capsys):
    def no() -> None:
        raise AssertionError("they differ")

    called = fake(no)
    assert main([*QUICK, "--threads", "1", "--out", str(tmp_path)]) == 1
    assert not called and [r.status for r in rows.read(tmp_path / "fake-cpu.csv")] == ["gate failed"]
    assert "GATE FAILED: AssertionError: they differ" in capsys.readouterr().out


def test_a_quick_run_leaves_the_results_alone(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    fake()
    assert main([*QUICK, "--threads", "1"]) == 0
    assert "not written" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main(["fake", "--device", "cpu", "--threads", "1", "--rounds", "1"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["fake-cpu.csv"]
    whole = (tmp_path / "fake-cpu.csv").read_bytes()
    assert main(["fake", "--case", "o*", "--device", "cpu", "--threads", "1", "--rounds", "1"]) == 0
    assert (tmp_path / "fake-cpu.csv").read_bytes() == whole  # a part does not take the place of the whole


def test_a_case_need_not_be_in_every_group_and_gates_take_it_too(fake, monkeypatch, capsys):
    fake()
    one = groups.cases
    monkeypatch.setattr(groups, "names", lambda: ["empty", "fake"])
    monkeypatch.setattr(groups, "cases", lambda group, *given, **options: iter(()) if group == "empty" else one(group, *given, **options))
    assert main(["all", *QUICK[1:], "--case", "one", "--threads", "1"]) == 0
    assert "fake/one" in capsys.readouterr().out
    assert main(["all", "--gates", "--case", "one", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "fake/one: passed\n"
    assert main(["fake", "--gates", "--case", "two", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], r"no group 'nothing'; known: fake, or all"),
        ([], r"no group given; known: fake, or all"),
        ([*QUICK, "--case", "two"], r"--case is 'two', which no case of fake matches"),
        ([*QUICK, "--out", "/dev/null/x"], r"cannot write to folder"),
        pytest.param(
            ["fake", "--quick", "--device", "cuda"],
            r"torch sees no CUDA device; use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_wrong_arguments_give_one_line(fake, capsys, arguments, message):
    fake()
    assert main(arguments) == (1 if "/dev/null/x" in arguments else 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("bench: ")
    assert re.search(message, error)


@pytest.mark.parametrize("arguments", [["fake", "--threads", "0"], ["--threads", "1", "fake"], ["fake", "--device", "tpu"]])
def test_argparse_refuses_the_rest(fake, arguments):
    fake()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_all_groups_are_listed_without_allocating(capsys):
    assert main(["all", "--list", "--device", "cpu"]) == main(["all", "--list", "--device", "cuda"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {group}/" in text for group in groups.names()) and "arm" in groups.names()


def test_a_process_needs_no_configuration_framework():
    code = "import sys, bench.__main__ as b\nassert b.main(['all', '--list']) == 0\nassert not {'hydra', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=120)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_the_gpu_script_says_in_one_line_that_there_is_no_gpu(tmp_path):
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(["bash", str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "no NVIDIA GPU" in run.stderr and not (tmp_path / "out").exists()


def test_the_gpu_script_goes_on_after_a_failed_stage_and_says_so(tmp_path):
    """On stand-ins for the GPU and for Python, whose tests fail."""
    stand_ins = {"nvidia-smi": "exit 0", "python": 'case "$*" in *pytest*) echo told; exit 3;; esac'}
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path)}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "tests", "bench"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert run.returncode == 1 and run.stderr == ""
    summary = (tmp_path / "summary.txt").read_text()
    assert [line.split()[2:] for line in summary.splitlines()[:2]] == [["tests", "FAILED:", "status", "3"], ["bench", "passed"]]
    assert "1 of 2 steps failed" in summary
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
        assert {"tests.log", "bench.log", "machine.log", "summary.txt"} <= names
