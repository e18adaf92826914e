"""The kinds of dynamics to compare, as changes to one configuration that leave everything else the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttcfast.checks import each_once, whole
from ttcfast.runtime.errors import ArgumentError

_TARGETS = {  # model and loss
    "mlp": ("ttcfast.pwm.models.world_model.MLPWorldModel", "ttcfast.pwm.algorithms.dynamics_loss.MLPDynamicsLoss"),
    "residual": ("ttcfast.pwm.models.world_model.ResidualWorldModel", "ttcfast.pwm.algorithms.dynamics_loss.MLPDynamicsLoss"),
    "flow": ("ttcfast.pwm.models.flow_world_model.FlowWorldModel", "ttcfast.pwm.algorithms.dynamics_loss.FlowMatchingDynamicsLoss"),
}


@dataclass(frozen=True)
class Arm:
    """One kind of dynamics.

    Args:
        name: ``"mlp"``, ``"residual"``, or integrator and substeps of a flow, such as ``"euler1"`` or ``"heun4"``.

    Raises:
        ArgumentError: The name is none of these.
    """

    name: str

    def __post_init__(self) -> None:
        if self.kind == "flow" and not re.fullmatch(r"(heun|euler)[1-9][0-9]*", self.name):
            raise ArgumentError(f"arms is {self.name!r}; it must be mlp, residual, or heun or euler with its substeps, such as heun2")

    @property
    def kind(self) -> str:
        """``"mlp"``, ``"residual"`` or ``"flow"``."""
        return self.name if self.name in ("mlp", "residual") else "flow"

    @property
    def method(self) -> str | None:
        """Integrator of a flow, ``"heun"`` or ``"euler"``."""
        return self.name.rstrip("0123456789") if self.kind == "flow" else None

    @property
    def substeps(self) -> int | None:
        """Number of substeps K of a flow."""
        return int(self.name[len(self.method) :]) if self.method is not None else None

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        if self.method is None:
            return {"mlp": "MLP", "residual": "residual MLP"}[self.name]
        return f"flow, {self.method.capitalize()} K = {self.substeps}"

    def configure(self, alg: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``alg`` group with this arm's model, loss and integrator; an MLP keeps the group's last layer of the dynamics.

        Raises:
            ArgumentError: The group has no model.
        """
        if not alg.get("model"):
            raise ArgumentError(f"alg is {dict(alg)}; give a group of ttcfast/configs/alg, such as alg=pwm_cpu")
        model_class, loss_class = _TARGETS[self.kind]
        model = {**alg["model"], "_target_": model_class}
        if self.kind != "mlp":
            model["dynamics"] = None
        changed = {**alg, "use_flow_dynamics": None, "model": model, "dynamics_loss": {"_target_": loss_class}}
        if self.method is not None:
            changed["integrator"] = {**alg.get("integrator", {}), "type": self.method, "substeps": self.substeps}
        return changed


def check_runs(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ``ValueError`` unless there are arms and random seeds, known ones and each once."""
    each_once("arms", arms)
    each_once("seeds", seeds)
    for arm in arms:
        Arm(arm)
    for seed in seeds:
        whole("seeds", seed, 0)
