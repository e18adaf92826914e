"""Test-time computing: search over candidate next states, greedy or with beams, its guardrails, projection, baselines and results."""

from .baselines import BASELINES, baseline_rollout
from .beam import TTCBeam
from .budget import Budget
from .inference import TTCConfig, TTCGreedy
from .projection import project_conservation
from .regret import ChoiceRegret, choice_regret
from .result import BeamStepOutput, RolloutResult, StepOutput

__all__ = [
    "TTCConfig",
    "TTCGreedy",
    "TTCBeam",
    "Budget",
    "RolloutResult",
    "StepOutput",
    "BeamStepOutput",
    "project_conservation",
    "BASELINES",
    "baseline_rollout",
    "choice_regret",
    "ChoiceRegret",
]
