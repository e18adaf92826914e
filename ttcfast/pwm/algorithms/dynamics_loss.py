"""What the dynamics are trained on, given the rollout that the algorithm made: one strategy per kind of dynamics."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.integrators import Euler, Heun, Integrator, integrate
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.pwm.models.flow_world_model import FlowWorldModel
from ttcfast.pwm.models.layers import wide

__all__ = ["DynamicsLoss", "Euler", "FlowMatchingDynamicsLoss", "Heun", "Integrator", "MLPDynamicsLoss", "discounts", "integrate"]


class DynamicsLoss(ABC):
    """A loss per step of a rollout; the algorithm weighs and adds the steps."""

    @abstractmethod
    def __call__(self, model: BaseWorldModel, latents: Tensor, act: Tensor, targets: Tensor, task: Task | None = None) -> Tensor:
        """The loss of every step, means over batch and latent entries
        (docs/design/decisions.md ("Loss scale and gradient")).

        Args:
            model: whose rollout it is.
            latents: the rollout ``[H + 1, B, latent_dim]``, with its gradient: ``latents[t + 1] = model.next(latents[t], act[t])``.
            act: ``[H, B, action_dim]``.
            targets: encodings of the observations after each action, ``[H, B, latent_dim]``, without gradient.
            task: as for ``model.next``.

        Returns:
            ``[H]``.
        """


class MLPDynamicsLoss(DynamicsLoss):
    """Squared error of the predicted latent state: PWM's consistency loss; for residual dynamics as well."""

    def __call__(self, model: BaseWorldModel, latents: Tensor, act: Tensor, targets: Tensor, task: Task | None = None) -> Tensor:
        return (wide(latents[1:]) - targets).square().mean((1, 2))


class FlowMatchingDynamicsLoss(DynamicsLoss):
    """Rectified flow from the predicted state to the encoding of the next observation.

    With ``z_s = latents[t]``, ``z_e = targets[t]`` and a time tau per sample, ``|| v((1 - tau) z_s + tau z_e, a, tau) - (z_e - z_s) ||^2``.
    The gradient flows through ``z_s``, both where the velocity is asked and in what it is compared with, and so through the rollout into
    the encoder, as the baseline's does; it stops at the target (docs/design/decisions.md ("Loss scale and gradient")).
    All steps are one evaluation.

    Args:
        tau_sampling: ``"uniform"``, or ``"midpoint"``: tau = 1/2 always, which never trains the times that integrators ask for; it warns.

    Raises:
        ValueError: an unknown sampling; when called, a model that has no velocity.

    Source: Flow plan, "Mathematical Specification".
    """

    def __init__(self, tau_sampling: str = "uniform") -> None:
        one_of("tau_sampling", tau_sampling, ("uniform", "midpoint"))
        self.tau_sampling = tau_sampling
        if tau_sampling == "midpoint":
            warnings.warn(
                "tau_sampling='midpoint' trains the velocity at tau = 0.5 alone; Heun and Euler ask for it at k / K, which stays untrained",
                stacklevel=2,
            )

    def __call__(self, model: BaseWorldModel, latents: Tensor, act: Tensor, targets: Tensor, task: Task | None = None) -> Tensor:
        if not isinstance(model, FlowWorldModel):
            raise ValueError(f"FlowMatchingDynamicsLoss needs a FlowWorldModel and was given a {type(model).__name__}; use MLPDynamicsLoss")
        start = latents[:-1]
        tau = self.times(start)
        at = start + tau * (targets - start)
        error = wide(model.velocity(at, act, tau, task)) - (targets - start)
        return error.square().mean((1, 2))

    def times(self, like: Tensor) -> Tensor:
        """Times ``[H, B, 1]`` for latents ``[H, B, D]``, from torch's global generator."""
        shape = (*like.shape[:-1], 1)
        if self.tau_sampling == "midpoint":
            return like.new_full(shape, 0.5)
        return torch.rand(shape, dtype=like.dtype, device=like.device)


def discounts(horizon: int, gamma: float, like: Tensor) -> Tensor:
    """gamma^t for t = 0 ... horizon - 1, ``[horizon]``."""
    return gamma ** torch.arange(horizon, dtype=like.dtype, device=like.device)
