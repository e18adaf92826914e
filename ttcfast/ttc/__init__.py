"""Test-time computing: search over candidate next states, greedy or with beams, its guardrails, projection and results."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from .beam import TTCBeam
from .budget import Budget
from .inference import TTCConfig, TTCGreedy
from .projection import project_conservation
from .result import BeamStepOutput, RolloutResult, StepOutput

__all__ = ["TTCConfig", "TTCGreedy", "TTCBeam", "Budget", "RolloutResult", "StepOutput", "BeamStepOutput", "project_conservation"]

_MOVED = {"BASELINES": "baselines", "baseline_rollout": "baselines", "choice_regret": "regret", "ChoiceRegret": "regret"}


def __getattr__(name: str) -> Any:
    """Resolve names that version 0.1 exported here and that now live in ``ttcfast.evaluation``."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = f"ttcfast.evaluation.{_MOVED[name]}"
    warnings.warn(f"ttcfast.ttc.{name} has moved to {where}; import it from there", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(where), name)
