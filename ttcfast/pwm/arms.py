"""The kinds of dynamics that are compared, as changes to one configuration: everything else stays the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ttcfast.runtime.errors import ArgumentError

_MODELS = {
    "mlp": "ttcfast.pwm.models.world_model.MLPWorldModel",
    "residual": "ttcfast.pwm.models.world_model.ResidualWorldModel",
    "flow": "ttcfast.pwm.models.flow_world_model.FlowWorldModel",
}
_LOSSES = {
    "mlp": "ttcfast.pwm.algorithms.dynamics_loss.MLPDynamicsLoss",
    "residual": "ttcfast.pwm.algorithms.dynamics_loss.MLPDynamicsLoss",
    "flow": "ttcfast.pwm.algorithms.dynamics_loss.FlowMatchingDynamicsLoss",
}


@dataclass(frozen=True)
class Arm:
    """One kind of dynamics.

    Args:
        name: ``"mlp"``, ``"residual"``, or a flow's integrator and substeps: ``"euler1"``, ``"heun4"``.
    """

    name: str

    def __post_init__(self) -> None:
        if self.kind == "flow" and not re.fullmatch(r"(heun|euler)[1-9][0-9]*", self.name):
            raise ArgumentError(f"arms is {self.name!r}; it must be mlp, residual, or heun or euler with its substeps, such as heun2")

    @property
    def kind(self) -> str:
        return self.name if self.name in ("mlp", "residual") else "flow"

    @property
    def method(self) -> str | None:
        """The flow's integrator, ``"heun"`` or ``"euler"``."""
        return self.name.rstrip("0123456789") if self.kind == "flow" else None

    @property
    def substeps(self) -> int | None:
        """The flow's K."""
        return int(self.name[len(self.method) :]) if self.method is not None else None

    @property
    def label(self) -> str:
        """For tables and figures."""
        if self.method is None:
            return {"mlp": "MLP", "residual": "residual MLP"}[self.name]
        return f"flow, {self.method.capitalize()} K = {self.substeps}"

    def configure(self, alg: Mapping[str, Any]) -> dict[str, Any]:
        """The ``alg`` group with this arm's model, loss and integrator; an MLP keeps the group's own last layer of the dynamics.

        Raises:
            ArgumentError: a group without a model.
        """
        if not alg.get("model"):
            raise ArgumentError(f"alg is {dict(alg)}; give a group of ttcfast/configs/alg, such as alg=pwm_cpu")
        model = {**alg["model"], "_target_": _MODELS[self.kind]}
        if self.kind != "mlp":
            model["dynamics"] = None
        changed = {**alg, "use_flow_dynamics": None, "model": model, "dynamics_loss": {"_target_": _LOSSES[self.kind]}}
        if self.method is not None:
            changed["integrator"] = {**alg.get("integrator", {}), "type": self.method, "substeps": self.substeps}
        return changed
