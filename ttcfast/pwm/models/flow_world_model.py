"""Dynamics as a flow: a learned velocity field carries the latent state over the unit interval to the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.integrators import Heun, Integrator
from ttcfast.ops import mlp
from ttcfast.ops.heun import centered

from .base import BaseWorldModel, Task
from .layers import Network, linear, state

MATMUL_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class FlowWorldModel(BaseWorldModel):
    """A world model with dynamics ``dz/dtau = v(z, a, tau)`` for tau in [0, 1].

    The velocity is an MLP on ``[z, task embedding, a, tau]`` with a linear last layer, less its mean over each group of the latent, so that
    every integrator preserves the sums of the groups (docs/design/decisions.md ("Simplex", "Time channel")).

    Args:
        integrator: Integrator of ``ttcfast.integrators`` that :meth:`next` uses; None for Heun with 2 substeps.
        fused: Whether to integrate by ``ttcfast.ops.mlp_flow``; False runs the plain loop over :meth:`velocity`, equal up to rounding.
        matmul_dtype: ``"bfloat16"`` rounds operands and results of the fused path's matrix products; the state stays float32.
        others: Arguments of :class:`BaseWorldModel`.

    Raises:
        ValueError: As for :class:`BaseWorldModel`; or the dynamics do not end in a linear layer.

    Source: Flow plan, "Mathematical Specification", "ODE Integrator Choice and Justification".
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        *,
        integrator: Integrator | None = None,
        fused: bool = True,
        matmul_dtype: str = "float32",
        **others: Any,
    ) -> None:
        super().__init__(observation_dim, action_dim, **others)
        one_of("matmul_dtype", matmul_dtype, tuple(MATMUL_DTYPES))
        self.integrator = integrator or Heun(2)
        self.fused, self.matmul_dtype = fused, matmul_dtype

    def _make_dynamics(self, inputs: int, last: Mapping[str, Any] | None) -> Network:
        last = dict(last or {"last_layer": "linear"})
        if last.get("last_layer", "linear") != "linear":
            raise ValueError(f"dynamics.last_layer is {last['last_layer']!r}; a velocity takes both signs, so give 'linear'")
        return Network(inputs + 1, self.units, self.latent_dim, **last)

    @property
    def evaluations(self) -> int:
        return self.integrator.evaluations

    def velocity(self, z: Tensor, a: Tensor, tau: Tensor | float, task: Task | None = None) -> Tensor:
        """Return the velocity at time ``tau`` of the step, ``[..., latent_dim]``; it sums to 0 over every group of the latent.

        Args:
            z: Latent states, ``[..., latent_dim]``.
            a: Actions, ``[..., action_dim]``.
            tau: One time in [0, 1], or one per row, ``[...]`` or ``[..., 1]``.
            task: As in :meth:`encode`.

        Raises:
            ValueError: As in :meth:`encode`; or a time lies outside [0, 1]. Tensors on other devices than the CPU are not checked, since
                that would wait for the device; nor is any tensor under ``torch.func`` or while a graph is compiled.
        """
        self._check_pair(z, a)
        _check_times(tau)
        conditions = self._conditions(z, a, task)
        weight_z, weight_c, weight_tau = self._split_weight()
        if isinstance(tau, Tensor) and tau.ndim and tau.shape == z.shape[:-1]:
            tau = tau.unsqueeze(-1)
        rows = linear(conditions, weight_c) + tau * weight_tau
        parts = self.dynamics_network.parts()
        network = parts._replace(weights=[weight_z, *parts.weights[1:]])
        return centered(state(mlp(z, network, rows=rows.expand(*z.shape[:-1], -1), eps=self.dynamics_network.eps)), self.group)

    def next(self, z: Tensor, a: Tensor, task: Task | None = None) -> Tensor:
        if not self.fused:
            self._check_pair(z, a)
            return self.integrator(lambda state, tau: self.velocity(state, a, tau, task), z)
        return self._integrate(z, a, task)

    def _integration(self) -> dict[str, Any] | None:
        if not self.fused:
            return None
        how = {"method": self.integrator.name, "substeps": self.integrator.substeps, "group": self.group}
        return {**how, "matmul_dtype": MATMUL_DTYPES[self.matmul_dtype]}

    def _conditions(self, z: Tensor, a: Tensor, task: Task | None) -> Tensor:
        """Return what stays constant during integration: ``[task embedding, a]``."""
        return self._join(z[..., :0], task, self.masked(a, task)).to(z.dtype)

    def _split_weight(self) -> tuple[Tensor, ...]:
        """Return views of the first weight for latent and conditions, ``[units[0], ...]``, and for time, ``[units[0]]``."""
        weight = self.dynamics_network.parts().weights[0]
        z, conditions, tau = weight.split([self.latent_dim, self.task_dim + self.action_dim, 1], dim=-1)
        return z, conditions, tau.squeeze(1) if tau.ndim == 2 else tau.mT


def _check_times(tau: Tensor | float) -> None:
    if isinstance(tau, Tensor):
        if tau.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tau):
            return
        outside = tau[(tau < 0) | (tau > 1) | tau.isnan()]
        if outside.numel():
            raise ValueError(f"tau holds {float(outside.flatten()[0])}; times lie in [0, 1]")
    elif not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; times lie in [0, 1]")
