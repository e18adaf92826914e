"""Scorers that tests of the search share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ttcfast.rewards.common import ARMScorer, Scorer
from ttcfast.spec import ARMWeights, StateSpec


def last_cell(x_t: Tensor, cand_tp1: Tensor) -> Tensor:
    """A score that no two candidates share."""
    return cand_tp1[:, 0, -1, -1]


def arm(spec: StateSpec | None = None, **weights: float) -> ARMScorer:
    """The analytical reward with its defaults and some weights changed."""
    return ARMScorer(ARMWeights(**weights), spec=spec)


class Towards(Scorer):
    """Minus the mean squared distance to a field; records the largest conservation residual of the candidates it is given."""

    marks_nonfinite, maximum = True, 0.0

    def __init__(self, field: Tensor, scores_projected: bool = False) -> None:
        super().__init__()
        self.field, self.scores_projected, self.residuals = field, scores_projected, list[float]()

    def score_group(self, state: Tensor, candidates: Tensor, context: Any) -> Tensor:
        self.residuals.append(float((candidates.detach() - state.unsqueeze(1)).double().mean((-2, -1)).abs().max()))
        field = self.field if context is None else self.field[context.problem_ids]
        return -(candidates - field.unsqueeze(1)).square().mean((2, 3, 4))
