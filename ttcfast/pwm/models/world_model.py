"""The baseline dynamics, an MLP that predicts the next latent state, and a control that predicts its change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ttcfast.ops import heun_predict

from .base import BaseWorldModel, Task
from .layers import Network, state


class MLPWorldModel(BaseWorldModel):
    """The dynamics of PWM and TD-MPC2, ``z' = F(z, a)``, which end in SimNorm like the encoder."""

    def _make_dynamics(self, inputs: int, last: Mapping[str, Any] | None) -> Network:
        default = {"last_layer": "simnorm", "last_layer_kwargs": {"group": self.group}} if self.group else {"last_layer": "linear"}
        return Network(inputs, self.units, self.latent_dim, **(last or default))

    def next(self, z: Tensor, a: Tensor, task: Task | None = None) -> Tensor:
        return state(self._at(self.dynamics_network, z, a, task))

    def _integration(self) -> dict[str, Any] | None:
        return {"method": "map", "substeps": 1} if isinstance(self.dynamics_network.last, nn.Linear) else None


class ResidualWorldModel(BaseWorldModel):
    """Residual dynamics ``z' = z + f(z, a)`` without the group means of ``f``: one Euler step of a flow that is evaluated at tau = 0 alone.

    Without this control, "flow" may only mean "residual"; see docs/design/decisions.md ("Control arms").
    """

    def _make_dynamics(self, inputs: int, last: Mapping[str, Any] | None) -> Network:
        return Network(inputs, self.units, self.latent_dim, **(last or {"last_layer": "linear"}))

    def next(self, z: Tensor, a: Tensor, task: Task | None = None) -> Tensor:
        if self._integration() is None:
            return heun_predict(z, self._at(self.dynamics_network, z, a, task), 1.0, group=self.group)
        return self._integrate(z, a, task)

    def _integration(self) -> dict[str, Any] | None:
        linear = isinstance(self.dynamics_network.last, nn.Linear)
        return {"method": "euler", "substeps": 1, "group": self.group} if linear else None
