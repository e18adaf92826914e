"""Compares the number of parameters of a model and its baseline, so that a comparison of them is not one of sizes."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ttcfast.checks import at_least, one_of
from ttcfast.pwm.models.base import BaseWorldModel
from ttcfast.pwm.models.world_model import MLPWorldModel
from ttcfast.runtime.errors import UserError

logger = logging.getLogger(__name__)


class ParityError(UserError, ValueError):
    """The numbers of parameters differ by more than the tolerance and ``on_violation`` is ``"abort"``."""

    status = 2


@dataclass(frozen=True)
class Parity:
    """Parameter counts of two whole models and of their dynamics, with gaps relative to the baseline."""

    base: int
    model: int
    dynamics_base: int
    dynamics_model: int

    @property
    def gap(self) -> float:
        """Gap of the whole models, (model - base) / base, to which the tolerance applies."""
        return (self.model - self.base) / self.base

    @property
    def dynamics_gap(self) -> float:
        """Gap of the dynamics, which encoder and reward hide in the gap of the whole models."""
        return (self.dynamics_model - self.dynamics_base) / self.dynamics_base

    def __str__(self) -> str:
        whole = f"{self.model:,} parameters against {self.base:,} of the baseline ({self.gap:+.3%})"
        return f"{whole}; dynamics {self.dynamics_model:,} against {self.dynamics_base:,} ({self.dynamics_gap:+.3%})"


def parameter_parity(
    model: BaseWorldModel, base: BaseWorldModel | None = None, *, tolerance: float = 0.02, on_violation: str = "warn"
) -> Parity:
    """Compare the parameter counts of a model and its baseline, and log them.

    Args:
        model: Model to compare, such as a ``FlowWorldModel``.
        base: Baseline; None for an ``MLPWorldModel`` with the arguments of ``model``, made without memory, or for the model itself if it
            is one.
        tolerance: Largest |gap| of the whole models.
        on_violation: ``"warn"`` to log a warning, ``"abort"`` to raise.

    Raises:
        ParityError: The gap exceeds the tolerance and ``on_violation`` is ``"abort"``.
        ValueError: ``on_violation`` is unknown, or the tolerance is negative.

    Source: Flow plan, "Fairness: Parameter Parity"; docs/design/decisions.md ("Parameter parity").
    """
    one_of("on_violation", on_violation, ("warn", "abort"))
    at_least("tolerance", tolerance, 0)
    if base is None and type(model) is MLPWorldModel:
        base = model
    elif base is None:
        with torch.device("meta"):
            base = MLPWorldModel(**{**model.arguments, "dynamics": None})
    found = Parity(base.total_params, model.total_params, base.dynamics_params, model.dynamics_params)
    name = type(model).__name__
    if abs(found.gap) <= tolerance:
        logger.info("parity: %s has %s", name, found)
        return found
    message = f"parity: {name} has {found}, more than the tolerance of {tolerance:.1%}"
    if on_violation == "abort":
        raise ParityError(f"{message}; change units, or set parity.tolerance or parity.on_violation=warn")
    logger.warning("%s", message)
    return found
