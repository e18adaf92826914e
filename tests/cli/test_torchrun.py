"""``torchrun -m ttcfast.cli.run_ttc``: one run by several processes."""

import csv
import os
import subprocess
import sys

import pytest

from tests.small_run import write_examples

KEYS = ("ttc.branching_factor=4", "ttc.beam_width=2", "ttc.approach=beam", "eval.rollout_T=3", "data.split=null", "data.n=2")
FIXED = "ttc.chunk_size=8"  # the shapes of the model's products, and with them their rounding, whatever a process has of the problems


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["problems", "candidates"])
def test_two_processes_write_what_one_writes(shard, tmp_path):
    examples = write_examples(tmp_path / "examples")
    keys = [f"fm.ckpt={examples / 'surrogate.safetensors'}", f"data.root={examples}", *KEYS, FIXED]
    alone = [sys.executable, "-m", "ttcfast.cli.run_ttc", *keys, f"out={tmp_path / 'alone'}"]
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:-1], f"ttc.shard={shard}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = {"cwd": tmp_path, "env": environment, "check": True, "stdout": subprocess.PIPE, "text": True}
    subprocess.run(alone, **run)
    said = subprocess.run([*several, f"out={tmp_path / 'several'}"], **run).stdout
    assert said.count("Numbers: ") == 1  # by the first process alone
    measured = [read(tmp_path / name / "summary.csv") for name in ("alone", "several", "several/rank1")]
    assert any(row["method"] == "arm_beam" for row in measured[0]) and measured[0] == measured[1] == measured[2]


def read(path):
    """The rows, less their seconds and memory."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_bytes")} for row in csv.DictReader(path.open())]
