"""Three tasks of a newcomer, each a script of docs/tasks that is run as a user would run it, in an empty folder."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ttcfast.data import open_trajectories

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"neuraloperator_rollout": ("neuralop",), "netcdf_data": ("xarray", "h5netcdf"), "pendulum": ("gymnasium",)}
pytestmark = pytest.mark.slow  # 15 to 40 s of one core each


def done(name: str, folder: Path) -> str:
    """Runs a script with ``folder`` as the current one, and returns what it printed."""
    if lacking := [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(lacking)}")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    script = ROOT / "docs" / "tasks" / f"{name}.py"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def share_of_persistence(folder: Path, data: str) -> float:
    """Squared error of the improved rollout over that of the first state held still, both over all steps."""
    made = torch.load(folder / "improved.pt")
    truth = open_trajectories(folder / data, split="test").stack()[:, : made.shape[1]]
    assert made.shape == truth.shape and torch.equal(made[:, 0], truth[:, 0])
    return float((made - truth).square().sum() / (truth[:, :1] - truth).square().sum())


def row(table: str, method: str) -> str:
    return next(line for line in table.splitlines() if line.split("  ")[0].strip() == method)


def test_the_rollout_of_a_neuraloperator_model_is_improved(tmp_path):
    said = done("neuraloperator_rollout", tmp_path)
    plain, mean = (float(row(said, method).split("[")[0].split()[-1]) for method in ("deterministic", "mean of B"))
    assert mean < 0.9 * plain and share_of_persistence(tmp_path, "flow") < 0.55  # 0.83 of it and 0.47 measured


def test_a_netcdf_data_set_is_brought(tmp_path):
    said = done("netcdf_data", tmp_path)
    plain, mean = (float(row(said, method).split("[")[0].split()[-1]) for method in ("deterministic", "mean of B"))
    assert mean < plain and share_of_persistence(tmp_path, "water") < 0.1
    drift, depth = re.findall(r"drift of mass (\S+), smallest depth (\S+)", said)[0]
    assert float(drift) < 1e-5 and 0 < float(depth) < 1


def test_a_world_model_of_a_gymnasium_environment_is_trained_and_planned_with(tmp_path):
    said = done("pendulum", tmp_path)
    returns = [float(found) for found in re.findall(r"(?:policy|planning): return (-?\d+)", said)]
    assert len(returns) == 2 and min(returns) > -500, said  # random episodes have -1664 to -852
