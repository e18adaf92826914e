"""Gaussian noise on a state."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ttcfast.spec import at_least


@torch.no_grad()
def perturb_state(x: Tensor, eps: float, *, generator: Generator | None = None) -> Tensor:
    """``x + eps * N(0, 1)``, drawn in the state's dtype on its device; a new tensor, without gradient.

    Args:
        x: any shape, floating point.
        eps: standard deviation in the units of ``x``, at least 0.
        generator: source of randomness on the state's device; None takes torch's own.

    Raises:
        ValueError: ``eps`` is negative.

    Source: seeds/ttc-integration-plan.md section 3C.
    """
    at_least("eps", eps, 0)
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return torch.add(x, noise, alpha=eps)
