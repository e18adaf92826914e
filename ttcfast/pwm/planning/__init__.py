"""Planning in imagination: action sequences are searched in a world model, by MPPI, CEM or a beam search over latent states.

Source: docs/design/decisions.md ("Planning").
"""

from .plan import Plan, plan
from .planner import Planner
from .settings import METHODS, PlanSettings

__all__ = ["METHODS", "Plan", "PlanSettings", "Planner", "plan"]
