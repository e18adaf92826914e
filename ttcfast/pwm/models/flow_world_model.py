"""Dynamics as a flow: the next latent state is the current one carried over the unit interval by a learned velocity field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttcfast.checks import one_of
from ttcfast.integrators import Heun, Integrator
from ttcfast.ops import VelocityMLP, mlp_flow
from ttcfast.ops.heun import centered

from .base import BaseWorldModel, Task
from .layers import Network, NormedLinear, state

MATMUL_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


class FlowWorldModel(BaseWorldModel):
    """``dz/dtau = v(z, a, tau)`` for tau in [0, 1].

    The velocity is an MLP on ``[z, task embedding, a, tau]`` whose last layer is linear, with the mean of each of the latent's groups taken
    out, so that every integrator keeps the sums of the groups (docs/design/decisions.md ("Simplex", "Time channel")).

    Args:
        integrator: an integrator of ``ttcfast.integrators``; used by :meth:`next` wherever it is called from.
        fused: integrate by ``ttcfast.ops.mlp_flow``; False: the plain loop over :meth:`velocity`, which is the same to rounding.
        matmul_dtype: ``"bfloat16"`` rounds the inputs and results of the fused path's matrix products; the state stays float32.
        others: see :class:`BaseWorldModel`.

    Raises:
        ValueError: as :class:`BaseWorldModel`; or dynamics that do not end in a linear layer.

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
        """Slope of the latent state at time ``tau`` of the step.

        Args:
            z: latent states, ``[..., latent_dim]``.
            a: actions, ``[..., action_dim]``.
            tau: one time in [0, 1], or one per row, ``[...]`` or ``[..., 1]``.
            task: as for :meth:`encode`.

        Returns:
            ``[..., latent_dim]``; every group of the latent's sums to 0.

        Raises:
            ValueError: as :meth:`encode`; or a time outside [0, 1] (not looked at by
                ``torch.func``, nor while a CUDA graph is captured or a graph is compiled).
        """
        self._check_pair(z, a)
        _check_times(tau)
        conditions = self._conditions(z, a, task)
        weight_z, weight_c, weight_tau = self._split_weight()
        if isinstance(tau, Tensor) and tau.ndim and tau.shape == z.shape[:-1]:
            tau = tau.unsqueeze(-1)
        rows = F.linear(conditions, weight_c) + tau * weight_tau
        first, *hidden = self._hidden()
        x = first.finish(F.linear(z, weight_z), rows)
        for layer in hidden:
            x = layer(x)
        return centered(state(self.dynamics_network.last(x)), self.group)

    def next(self, z: Tensor, a: Tensor, task: Task | None = None) -> Tensor:
        self._check_pair(z, a)
        if not self.fused:
            return self.integrator(lambda state, tau: self.velocity(state, a, tau, task), z)
        weight_z, weight_c, weight_tau = self._split_weight()
        layers = self._hidden()
        last = self.dynamics_network.last
        assert isinstance(last, torch.nn.Linear)
        flat = z.reshape(-1, self.latent_dim)
        rows = F.linear(self._conditions(z, a, task).reshape(-1, weight_c.shape[1]), weight_c, layers[0].linear.bias)
        times = self._times(z) * weight_tau  # [K + 1, units[0]]
        network = VelocityMLP(
            [weight_z, *(layer.linear.weight for layer in layers[1:]), last.weight],
            [*(layer.linear.bias for layer in layers[1:]), last.bias],
            [layer.norm.weight for layer in layers],
            [layer.norm.bias for layer in layers],
        )
        return mlp_flow(
            flat,
            rows,
            times,
            network,
            method=self.integrator.name,
            substeps=self.integrator.substeps,
            group=self.group,
            eps=layers[0].norm.eps,
            matmul_dtype=MATMUL_DTYPES[self.matmul_dtype],
        ).reshape(z.shape)

    def _conditions(self, z: Tensor, a: Tensor, task: Task | None) -> Tensor:
        """What does not change along the way: ``[task embedding, a]``."""
        joined = self._join(z[..., :0], task, self.masked(a, task))
        return joined.to(z.dtype)

    def _split_weight(self) -> tuple[Tensor, ...]:
        """The first product's parts for latent, conditions and time, views ``[units[0], ...]``; the last as ``[units[0]]``."""
        weight = self._hidden()[0].linear.weight
        z, conditions, tau = weight.split([self.latent_dim, self.task_dim + self.action_dim, 1], dim=1)
        return z, conditions, tau.squeeze(1)

    def _times(self, like: Tensor) -> Tensor:
        """The distinct times of the integrator, ``[K + 1, 1]`` (Euler ``[K, 1]``), made on the device."""
        count = len(self.integrator.times())
        return (torch.arange(count, device=like.device, dtype=like.dtype) / self.integrator.substeps).unsqueeze(1)

    def _hidden(self) -> list[NormedLinear]:
        return list(self.dynamics_network.hidden)  # type: ignore[arg-type]


def _check_times(tau: Tensor | float) -> None:
    if isinstance(tau, Tensor):
        if torch.compiler.is_compiling() or (tau.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(tau):
            return
        outside = tau[(tau < 0) | (tau > 1) | tau.isnan()]
        if outside.numel():
            raise ValueError(f"tau holds {float(outside.flatten()[0])}; times lie in [0, 1]")
    elif not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; times lie in [0, 1]")
