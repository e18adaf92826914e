"""No address outside its arrays is read by topk: the C++ path alone, built with sanitizers, as ``make sanitize`` builds the extension."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_ties_of_a_key_that_no_score_has_are_not_looked_for(tmp_path):
    """The k-th largest key was taken for the lower end of its bin, and with ids the last of its (no) ties was read before the array."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    program, sources = tmp_path / "topk", ["tests/ops/topk_sanitized.cpp", "csrc/topk_cpu.cpp", "csrc/topk_loop.cpp", "csrc/parallel.cpp"]
    flags = ["-std=c++17", "-DTTCFAST_LEVEL=generic", "-O0", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([compiler, *flags, *sources, "-o", program], cwd=ROOT, check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
