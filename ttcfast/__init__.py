"""Test-time computing for PDE surrogates, on fused operations with a reference, a CPU and a GPU implementation that agree.

Importing the package costs nothing: every name below is loaded when it is first used, and neither Triton nor the compiled extension nor
an optional dependency is needed to import it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {  # short name -> where it lives
    "StateSpec": "ttcfast.spec",
    "ARMWeights": "ttcfast.spec",
    "StochasticConfig": "ttcfast.spec",
    "Surrogate": "ttcfast.core.base_fm",
    "Ensemble": "ttcfast.models.ensemble",
    "Blend": "ttcfast.models.ensemble",
    "SolverStep": "ttcfast.models.ensemble",
    "ARMScorer": "ttcfast.rewards.arm",
    "PRMScorer": "ttcfast.rewards.prm.scorer",
    "Residual": "ttcfast.rewards.residual",
    "EulerResidualScorer": "ttcfast.rewards.residual",
    "VorticityResidual": "ttcfast.rewards.residual",
    "TTCConfig": "ttcfast.ttc.inference",
    "TTCGreedy": "ttcfast.ttc.inference",
    "TTCBeam": "ttcfast.ttc.beam",
    "Budget": "ttcfast.ttc.budget",
    "RolloutResult": "ttcfast.ttc.result",
    "improve": "ttcfast.front_door",
    "load": "ttcfast.front_door",
    "evaluate": "ttcfast.front_door",
    "Greedy": "ttcfast.searches",
    "Beam": "ttcfast.searches",
    "Particles": "ttcfast.searches",
    "Mean": "ttcfast.searches",
    "SoftmaxMean": "ttcfast.searches",
    "Span": "ttcfast.searches",
    "Refine": "ttcfast.searches",
    "info": "ttcfast.ops",
    "Symmetry": "ttcfast.states",
    "integrate": "ttcfast.integrators",
}
_PACKAGES = (
    *("adapters", "core", "data", "esnr", "evaluation", "integrators", "metrics", "models", "ops", "physics", "pwm", "rewards"),
    *("stochastic_sampling", "ttc"),
)

__all__ = ["__version__", *_NAMES, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"ttcfast.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'ttcfast' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
