"""The first call of bench/gpu.sh on a GPU, rehearsed on the fake device with a stand-in for nvidia-smi: gates, waits, a recorded step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench import groups

ROOT = Path(__file__).resolve().parents[2]
SMOKE = "import sys; from tests.fake_cuda import FakeCuda; from bench.smoke import main\nwith FakeCuda(): sys.exit(main())"


def test_the_smoke_test_passes_on_the_fake_device(tmp_path):
    python = f"case \"$*\" in '-m bench.smoke') exec '{sys.executable}' -c '{SMOKE}';; esac"
    for name, body in {"nvidia-smi": "exit 0", "python": python}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "PYTHONPATH": str(ROOT)}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), str(tmp_path / "out"), "smoke"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **given}, check=False)
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert run.returncode == 0, log
    assert "FAILED" not in log and "0 of 1 steps failed" in (tmp_path / "out" / "summary.txt").read_text()
    on_gpu = [name for name in groups.names() if next(groups.cases(name, "cuda", tiny=True), None) is not None]
    assert all(f"{name}/" in log for name in on_gpu)
    for line in ("greedy: passed; a step waits 1 times", "beams: passed; a step waits 2 times", "recorded: passed"):
        assert f"smoke/{line}" in log
