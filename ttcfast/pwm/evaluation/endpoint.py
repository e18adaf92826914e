"""The error by which all kinds of dynamics are compared: of the latent state after 1 to H steps, whatever loss they were trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast.pwm.models.base import BaseWorldModel, Task


@torch.no_grad()
def endpoint_error(model: BaseWorldModel, obs: Tensor, act: Tensor, task: Task | None = None) -> Tensor:
    """Mean squared error of predicted latents against encodings of what was observed.

    Args:
        model: encodes ``obs[0]`` and goes on from there by its own predictions.
        obs: ``[H + 1, B, observation_dim]``, held out.
        act: ``[H, B, action_dim]``.
        task: as for ``model.next``.

    Returns:
        ``[H]``: entry 0 is the one-step error, the last one that of H steps. A latent's scale is the encoder's own, so errors of two models
        are comparable relative to :func:`latent_variance`.

    Source: docs/design/decisions.md ("Control arms").
    """
    z, errors = model.encode(obs[0], task), []
    targets = model.encode(obs[1:], task)
    for a, target in zip(act, targets):
        z = model.next(z, a, task)
        errors.append((z - target).square().mean())
    return torch.stack(errors)


@torch.no_grad()
def latent_variance(model: BaseWorldModel, obs: Tensor, task: Task | None = None) -> Tensor:
    """Variance of the encodings of ``obs`` ``[..., observation_dim]``, mean over latent entries: what a constant guess errs by."""
    return model.encode(obs, task).flatten(0, -2).var(0, correction=0).mean()
