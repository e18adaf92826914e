"""The place in a sampler where it draws its Gaussian noise, so that a surrogate can key it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttcfast.checks import at_least


class NoiseSite(nn.Module):
    """Draws the Gaussian noise of a sampler: ``z = self.noise(like)`` instead of ``torch.randn_like(like)``.

    Inside a ``Surrogate`` the noise is keyed by problem, candidate, random seed and step, so that a diffusion, flow-matching or PDE-Refiner
    model has the same candidates in every chunk, beam and process; the surrogate's deterministic step takes zero for it. Each call within
    a forward draws independently. Elsewhere it comes from torch's global stream.

    Args:
        sigma: Standard deviation, not negative.
    """

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        at_least("sigma", sigma, 0)
        self.sigma = sigma
        self.keyed = False  # set by keyed_noise within its block

    def forward(self, like: Tensor) -> Tensor:
        """Returns noise of the shape, dtype and device of ``like``."""
        return torch.zeros_like(like) if self.keyed else self.sigma * torch.randn_like(like)
