"""``import ttcfast`` needs nothing that is optional, and loads nothing that is slow."""

import json
import subprocess
import sys

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked} or name == "ttcfast._C":
            raise ImportError(name + " is not there")

sys.meta_path.insert(0, Absent())
"""
REPORT = """
import json, sys
print(json.dumps(sorted(m for m in sys.modules if m.partition(".")[0] in {watched})))
"""
WATCHED = {"torch", "h5py", "hydra", "omegaconf", "matplotlib", "triton", "rich", "safetensors", "wandb", "tensorboard", "scipy"}


def loaded_by(code: str, watched: set[str] = WATCHED, blocked: set[str] = frozenset()) -> list[str]:
    source = BLOCK.format(blocked=set(blocked) or "()") + code + REPORT.format(watched=watched)
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing():
    assert loaded_by("import ttcfast; ttcfast.__version__") == []


def test_the_short_names_load_nothing_optional_beyond_torchs_own():
    optional = WATCHED - {"torch"}
    by_torch = set(loaded_by("import torch", optional))
    code = "from ttcfast import ARMScorer, StateSpec, TTCConfig, TTCGreedy, Surrogate, metrics"
    assert set(loaded_by(code, optional)) <= by_torch


def test_the_way_in_loads_neither_figures_nor_commands_nor_compilers():
    watched = {"matplotlib", "PIL", "hydra", "omegaconf", "triton", "wandb", "tensorboard", "scipy", "pandas", "sympy", "ttcfast"}
    by_torch = set(loaded_by("import torch", watched))
    added = set(loaded_by("import ttcfast; ttcfast.improve, ttcfast.evaluate, ttcfast.load", watched)) - by_torch
    packages = {name.split(".")[1] for name in added if name.startswith("ttcfast.")}
    assert {name for name in added if not name.startswith("ttcfast")} == set()
    assert not packages & {"report", "cli", "pwm", "kernels", "adapters", "experiments"} and {"front_door", "evaluation"} <= packages


def test_the_search_works_without_triton_extension_and_optional_packages():
    code = """
import torch
from ttcfast import ARMScorer, ARMWeights, TTCConfig, TTCGreedy

class FM:
    def sample_next(self, x_t, seed=None, multi=False):
        return x_t + 0.01 * torch.randn_like(x_t)

x0 = torch.rand(2, 4, 8, 8) * 0.1 + torch.tensor([1.0, 0.0, 0.0, 2.5]).reshape(4, 1, 1)
out = TTCGreedy(FM(), ARMScorer(ARMWeights(), 1.0), TTCConfig(branching_factor=3)).rollout(x0, 2)
assert out.isfinite().all()
"""
    assert loaded_by(code, {"triton", "h5py"}, blocked=WATCHED - {"torch"}) == []
