"""Test-time computing: greedy search over candidate next states, its guardrails, projection, baselines and results."""

from .baselines import BASELINES, baseline_rollout
from .inference import TTCConfig, TTCGreedy
from .projection import project_conservation
from .regret import ChoiceRegret, choice_regret
from .result import RolloutResult, StepOutput

__all__ = [
    "TTCConfig",
    "TTCGreedy",
    "RolloutResult",
    "StepOutput",
    "project_conservation",
    "BASELINES",
    "baseline_rollout",
    "choice_regret",
    "ChoiceRegret",
]
