"""World models of a few units, latents and actions to try them on, and a velocity written out by torch's own functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ttcfast.pwm.models import BaseWorldModel, FlowWorldModel
from ttcfast.pwm.models.layers import SimNorm

SMALL = {"latent_dim": 16, "units": (24, 20), "encoder_units": (12,)}


def small(kind: type[BaseWorldModel], **changes) -> BaseWorldModel:
    return kind(**{"observation_dim": 5, "action_dim": 3, **SMALL, **changes})


def batch(*lead: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Latents on the product of simplices, and actions."""
    z = SimNorm(8)(3 * torch.randn(*lead, 16, dtype=dtype))
    return z, 2 * torch.rand(*lead, 3, dtype=dtype) - 1


def stirred(model: BaseWorldModel) -> BaseWorldModel:
    """The model with parameters of order one, so that nothing it does is lost in rounding."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / max(p.shape[-1], 4) ** 0.5)
    return model


def plain_velocity(model: FlowWorldModel, z: Tensor, a: Tensor, tau: float) -> Tensor:
    """The velocity as the plan states it: everything concatenated, an MLP, group means taken out."""
    x = torch.cat([z, a, torch.full_like(z[..., :1], tau)], -1)
    network = model.dynamics_network
    for layer in network.hidden:
        x = F.mish(F.layer_norm(layer.linear(x), layer.norm.normalized_shape, layer.norm.weight, layer.norm.bias))
    x = network.last(x).unflatten(-1, (-1, 8))
    return (x - x.mean(-1, keepdim=True)).flatten(-2)
