from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import groups, rows
from bench.__main__ import main
from bench.targets import Target
from bench.timing import Case
from tests.runtime.test_progress import Terminal

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


def test_a_terminal_shows_how_many_cases_are_done(fake, tmp_path, monkeypatch):
    fake()
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert main([*QUICK, "--threads", "1", "2"]) == 0
    assert "bench fake" in terminal.getvalue() and "1/2" in terminal.getvalue() and "2/2" in terminal.getvalue()


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


SCRIPT = ["bash", str(ROOT / "bench" / "gpu.sh")]


@pytest.fixture
def gpu_script(tmp_path):
    """Runs bench/gpu.sh on stand-ins for the GPU's tools and for Python, given as {name: body}; results go to its folder "out"."""

    def run(*calls: str, **bodies: str) -> subprocess.CompletedProcess[str]:
        for name, body in {"nvidia-smi": "exit 0", "python": "exit 0", **bodies}.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
        return subprocess.run([*SCRIPT, *calls], capture_output=True, text=True, timeout=60, env={**os.environ, **given}, check=False)

    return run


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_the_gpu_script_says_in_one_line_that_there_is_no_gpu(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT[1]], check=True)
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        [*SCRIPT, str(tmp_path / "out"), "smoke"], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "no NVIDIA GPU" in run.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "give a call: build, smoke, tests, sanitizer, or a group"),
        (["tests", "nothing"], "no call 'nothing'; known: build, smoke, tests, sanitizer, agent arm "),
    ],
)
def test_the_gpu_script_refuses_other_calls_in_one_line(gpu_script, tmp_path, calls, message):
    run = gpu_script(*calls)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and message in run.stderr and not (tmp_path / "out").exists()


def test_the_gpu_script_goes_on_after_a_failed_step_and_hands_rows_over_as_they_are_made(gpu_script, tmp_path):
    rows_of_a_group = 'place="${@: -1}"; mkdir -p "$place"; echo "$*" >"$place/rows.csv"'
    python = f'case "$*" in -m?pytest*) echo told; exit 3;; *--out*) {rows_of_a_group};; esac'
    run = gpu_script("tests", "arm", "topk/n1e6 k64*", python=python)
    assert run.returncode == 1 and run.stderr == ""
    out = tmp_path / "out"
    said = [line.split(" s ", 1)[1].split() for line in (out / "summary.txt").read_text().splitlines()[:3]]
    assert said == [["tests", "FAILED:", "status", "3"], ["arm", "passed"], ["topk/n1e6", "k64*", "passed"]]
    assert "1 of 3 steps failed" in (out / "summary.txt").read_text() and "told" in (out / "gpu.log").read_text()
    assert (out / "rows.csv").read_text() == f"-m bench arm --device cuda --untuned --rounds 5 --case * --out {out}\n"
    assert "--case n1e6 k64* --out" in (out / "topk_n1e6_k64_" / "rows.csv").read_text()


def test_the_gpu_script_stops_when_its_time_is_over(gpu_script, tmp_path, monkeypatch):
    """A step gets what is left of the call's time, and one that finds none is not run."""
    late = (ROOT / "bench" / "gpu.sh").read_text().replace("SECONDS_IN_ALL=540", "SECONDS_IN_ALL=1").replace("/..", "")
    (tmp_path / "gpu.sh").write_text(late)
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", ["bash", str(tmp_path / "gpu.sh")])
    run = gpu_script("smoke", "arm", python='case "$*" in *bench.smoke*) sleep 20;; esac')
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert run.returncode == 1 and "FAILED: stopped after its 1 s" in summary and "NOT RUN: the call's 1 s are over" in summary


def test_the_readme_tells_a_call_for_every_group_with_cases_on_a_gpu():
    told = (ROOT / "bench" / "README.md").read_text()
    calls = set(re.findall(r"\w+", " ".join(re.findall(r"`(build [^`]+)`", told))))
    on_gpu = {name for name in groups.names() if next(groups.cases(name, "cuda"), None) is not None}
    assert on_gpu <= calls, on_gpu - calls
