"""The agents of bench_agent: their settings are those of the configuration files, and the gate sees a wrong peer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from bench.bench_agent import AGENT, WM, Problem, made, policy_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "ttcfast" / "configs"


def test_settings_are_those_of_the_configuration_files():
    alg, agent = (OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml")) for name in ("alg/pwm_control", "agent/control"))
    found = made("residual", (128, 128), (64, 64), 16, "cpu")
    assert alg["wm"] == WM and found.model.latent_dim == alg["model"]["latent_dim"] and found.model.observation_mean is not None
    config = policy_of(found).config
    sizes = {"actor": agent.pop("actor"), "critic": agent.pop("critic")}
    assert {name: list(value.pop("units")) for name, value in sizes.items()} == {"actor": [64, 64], "critic": [64, 64]}
    assert sizes == {"actor": {}, "critic": {"members": config.critic["members"]}}
    assert {k: v for k, v in agent.items() if k != "defaults"} == AGENT == {name: getattr(config, name) for name in AGENT}


@pytest.mark.parametrize("spoilt", ["dynamics", "actor", "critics"])
def test_the_gate_sees_another_agent(spoilt, monkeypatch):
    problem = Problem("residual", True, "cpu")
    copy = problem._copy

    def wrong(wrap):
        agent = copy(wrap)
        with torch.no_grad():
            part = {"dynamics": agent.model.dynamics, "actor": agent.actor, "critics": agent.critics}[spoilt]
            next(iter(part.parameters())).mul_(1.01)
        return agent

    monkeypatch.setattr(problem, "_copy", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        problem.check({})


def test_the_group_needs_no_hydra_h5py_or_simulator():
    code = "import sys\nfor name in ('hydra', 'omegaconf', 'h5py', 'dm_control', 'gymnasium', 'mujoco'):\n    sys.modules[name] = None\n"
    code += "from bench.bench_agent import Problem\nproblem = Problem('heun', True, 'cpu')\nproblem.update('ttcfast', 'both')\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
