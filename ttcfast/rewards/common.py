"""Keeps the plan's module path for the scorers, which live in files of their own; nothing inside the package imports it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arm import ARMScorer
from .composition import ScorerList
from .oracle import OracleScorer
from .residual import EulerResidualScorer, Residual, VorticityResidual
from .scorer import ScoreContext, Scorer, as_scorer

if TYPE_CHECKING:
    from .prm.scorer import PRMScorer as PRMScorer

__all__ = [
    "ARMScorer",
    "EulerResidualScorer",
    "OracleScorer",
    "PRMScorer",
    "Residual",
    "ScoreContext",
    "Scorer",
    "ScorerList",
    "VorticityResidual",
    "as_scorer",
]


def __getattr__(name: str) -> Any:
    if name == "PRMScorer":  # imported on first use, because it needs safetensors and the other scorers do not
        from .prm.scorer import PRMScorer

        return PRMScorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
