"""A plan in imagination: MPPI through the residual world model of size "cpu", 16 steps ahead, for one problem.

* ``plain torch``: the same search in a few lines: all sequences at once, ``torch.randn``, ``torch.topk``. The gate gives it our noise, with
  which both must find the same plan.
* ``memory``: the peak resident set of a separate process that makes a plan by one iteration, at two numbers of samples.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.ops import normal
from ttcfast.pwm.models import ResidualWorldModel
from ttcfast.pwm.planning import Plan, plan
from ttcfast.spec import Key
from ttcfast.ttc.memory import peak_bytes

from . import environment, timing
from .bench_search import MemoryTarget
from .rows import OK, PEER_FAILED, Row
from .targets import Target
from .timing import Case

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = {512: 6, 16384: 2}  # by number of samples
MEMORY, HORIZON = (4096, 262144), 16
ELITES, GAMMA, TEMPERATURE, STD_MIN, STD_MAX = 64, 0.99, 0.5, 0.05, 2.0  # the defaults of PlanSettings
LATENT, ACTIONS = 64, 3
OURS, PLAIN = "ttcfast", "plain torch"

TARGETS = (Target("samples*", PLAIN, "ratio", least=0.9), MemoryTarget("memory", "", "peak_mb", most=1.1))


def cases(device: str, *, tiny: bool = False) -> Iterator[Case]:
    peers: dict[str, Callable[[Problem], Any]] = {OURS: Problem.ours, PLAIN: Problem.plain}
    for samples, iterations in ITERATIONS.items():
        problem = Problem(96 if tiny else samples, iterations, device)
        yield problem.case("planning", f"samples {samples}", _shape(samples), "float32", peers)
    few = Problem(96 if tiny else MEMORY[0], 1, device)
    yield few.case("planning", "memory", _shape(MEMORY[0]), "float32", {f"samples {MEMORY[0]}": Problem.ours})


def further(device: str, pattern: str) -> Iterator[Row]:
    """Yield a row for each number of samples: the peak memory of a process that makes a plan."""
    for samples in MEMORY if device == "cpu" and fnmatchcase("memory", pattern) else ():
        base: dict[str, Any] = {"group": "planning", "case": "memory", "shape": _shape(samples), "dtype": "float32", "threads": 1}
        base |= {"ours": f"samples {MEMORY[0]}", "peer": f"samples {samples}", **environment.columns(device)}
        command = [sys.executable, "-m", "bench.bench_planning", str(samples)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        if run.returncode:
            yield Row(**base, status=PEER_FAILED, error=run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "killed")
        else:
            yield Row(**base, status=OK, error="", peak_mb=float(run.stdout) / 2**20)


class Problem(timing.Problem):
    """A latent state and a world model with rewards of order one."""

    def __init__(self, samples: int, iterations: int, device: str) -> None:
        self.samples, self.iterations, self.device = samples, iterations, device

    @cached_property
    def model(self) -> ResidualWorldModel:
        torch.manual_seed(0)
        model = ResidualWorldModel.of_size("cpu", 5, ACTIONS)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) / max(p.shape[-1], 4) ** 0.5)
        return model.eval().to(self.device)  # type: ignore[return-value]

    @cached_property
    def z(self) -> Tensor:
        with torch.no_grad():
            return self.model.encode(torch.randn(1, 5, generator=self.generator(1), device=self.device))

    def ours(self) -> Plan:
        return plan(self.model, self.z, HORIZON, self.samples, iterations=self.iterations)

    def plain(self) -> tuple[Tensor, Tensor]:
        return mppi(self.model, self.z, self.iterations, lambda i: torch.randn(self.samples, HORIZON, ACTIONS, device=self.device))

    def check(self, peers: Any) -> None:
        ids = torch.arange(self.samples, device=self.device)
        rows = torch.stack([torch.zeros_like(ids), ids], 1)
        ours = self.ours()
        actions, value = mppi(
            self.model, self.z, self.iterations, lambda i: normal(self.samples, (HORIZON, ACTIONS), key=Key(0, 0, 1 + i), rows=rows)
        )
        torch.testing.assert_close(ours.value, value[None], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours.actions, actions[None], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def mppi(model: ResidualWorldModel, z: Tensor, iterations: int, noise: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the best sequence ``[H, A]`` and its value; mean and zero sequence are among the candidates."""
    mean = z.new_zeros(HORIZON, ACTIONS)
    std, still = torch.full_like(mean, STD_MAX), torch.zeros_like(mean)
    best, best_value = still, returns(model, z, still[None])[0]
    for i in range(iterations):
        drawn = noise(i)
        drawn[0] = 0
        actions = torch.cat([(mean + std * drawn).clamp(-1, 1), still[None]])
        values, places = returns(model, z, actions).topk(ELITES if len(actions) > 8 * ELITES else len(actions) // 8)
        elites = actions[places]
        best, best_value = torch.where(values[0] > best_value, elites[0], best), torch.maximum(values[0], best_value)
        weights = (TEMPERATURE * (values - values[0])).softmax(0)[:, None, None]
        mean = (weights * elites).sum(0)
        std = (weights * (elites - mean).square()).sum(0).sqrt().clamp(STD_MIN, STD_MAX)
    value = returns(model, z, mean[None])[0]
    return torch.where(value > best_value, mean, best), torch.maximum(value, best_value)


def returns(model: ResidualWorldModel, z: Tensor, actions: Tensor) -> Tensor:
    """Return the discounted rewards of sequences ``[S, H, A]``."""
    states, total = z.expand(len(actions), -1), z.new_zeros(len(actions))
    for t in range(HORIZON):
        states, reward = model.step(states, actions[:, t])
        total = total + GAMMA**t * reward[:, 0]
    return total


def _shape(samples: int) -> str:
    return f"[{samples}, {HORIZON}, {ACTIONS}], z {LATENT}"


if __name__ == "__main__":
    Problem(int(sys.argv[1]), 1, "cpu").ours()
    print(peak_bytes(torch.device("cpu")))
