"""Losses of the dynamics on a rollout made by the algorithm, one strategy per kind of dynamics."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.integrators import Euler, Heun, Integrator, integrate
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.pwm.models.flow_world_model import FlowWorldModel
from ttcfast.pwm.models.layers import wide

__all__ = ["DynamicsLoss", "Euler", "FlowMatchingDynamicsLoss", "Heun", "Integrator", "MLPDynamicsLoss", "integrate"]


class DynamicsLoss(ABC):
    """Computes a loss for each step of a rollout; the algorithm weighs and sums the steps.

    Attributes:
        reads_last: Whether the state after the last action is needed; if not, the rollout ends one step earlier.
        evaluations: Evaluations of the dynamics network per step, besides those of the rollout.
    """

    reads_last: ClassVar[bool] = True
    evaluations: ClassVar[int] = 0

    @abstractmethod
    def __call__(self, model: BaseWorldModel, latents: Tensor, act: Tensor, targets: Tensor, task: Task | None = None) -> Tensor:
        """Return the loss of every step, ``[H]``, a mean over batch and latent entries.

        Args:
            model: The model that made the rollout.
            latents: The rollout with its gradient, ``latents[t + 1] = model.next(latents[t], act[t])``: ``[H + 1, B, latent_dim]``, or
                at least the first H states if not :attr:`reads_last`.
            act: Actions, ``[H, B, action_dim]``.
            targets: Encodings of the observations after each action, ``[H, B, latent_dim]``, without gradient.
            task: As in ``model.next``.

        Source: docs/design/decisions.md ("Loss scale and gradient").
        """


class MLPDynamicsLoss(DynamicsLoss):
    """Squared error of the predicted latent state, PWM's consistency loss; it fits residual dynamics as well."""

    def __call__(self, model: BaseWorldModel, latents: Tensor, act: Tensor, targets: Tensor, task: Task | None = None) -> Tensor:
        return (wide(latents[1:]) - targets).square().mean((-2, -1))


class FlowMatchingDynamicsLoss(DynamicsLoss):
    """Rectified flow from the predicted state to the encoding of the next observation.

    With ``z_s = latents[t]``, ``z_e = targets[t]`` and a time tau per sample it is
    ``|| v((1 - tau) z_s + tau z_e, a, tau) - (z_e - z_s) ||^2``, all steps in one evaluation. The gradient flows through both uses of
    ``z_s``, and so through the rollout into the encoder, as in the baseline; it stops at the target.

    Args:
        tau_sampling: ``"uniform"``, or ``"midpoint"`` for tau = 1/2 always, which warns: integrators use other times.

    Raises:
        ValueError: The sampling is unknown; or, when called, the model has no velocity.

    Source: Flow plan, "Mathematical Specification"; docs/design/decisions.md ("Loss scale and gradient").
    """

    reads_last = False
    evaluations = 1

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
        start = latents[: len(act)]
        tau = self.times(start)
        at = start + tau * (targets - start)
        return (wide(model.velocity(at, act, tau, task)) - (targets - start)).square().mean((-2, -1))

    def times(self, like: Tensor) -> Tensor:
        """Draw times ``[H, B, 1]`` for latents ``[H, B, D]`` from torch's global generator."""
        shape = (*like.shape[:-1], 1)
        if self.tau_sampling == "midpoint":
            return like.new_full(shape, 0.5)
        return torch.rand(shape, dtype=like.dtype, device=like.device)
