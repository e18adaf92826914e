"""The policy of an agent: a Gaussian on latent states, squashed by tanh."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ttcfast.checks import at_least

from .layers import Network


class Actor(nn.Module):
    """A policy ``a = tanh(mean(z) + std * noise)`` with a spread that does not depend on the state.

    The untrained policy acts with mean 0.

    Args:
        latent_dim: Size of a latent state.
        action_dim: Size of an action.
        units: Sizes of the hidden layers.
        std: Standard deviation before tanh that training starts from.
        min_std: Lowest standard deviation; below it the spread gets no gradient.

    Raises:
        ValueError: A size is below 1, or ``std`` lies below ``min_std`` or ``min_std`` below 0.

    Source: Georgiev et al., "PWM: Policy learning with multi-task world models", 2024 (arXiv:2407.02466), whose actor has these settings.
    """

    def __init__(
        self, latent_dim: int, action_dim: int, *, units: Sequence[int] = (400, 200, 100), std: float = 0.37, min_std: float = 0.24
    ) -> None:
        super().__init__()
        at_least("min_std", min_std, 1e-6)
        at_least("std", std, min_std)
        self.latent_dim, self.action_dim = latent_dim, action_dim
        self.network = Network(latent_dim, units, action_dim, last_layer_kwargs={"zero": True})
        for layer in self.network.hidden:  # LayerNorm follows: from weights as small as a world model's, Adam's steps would be too large
            nn.init.orthogonal_(layer.linear.weight, gain=math.sqrt(2))  # type: ignore[arg-type, union-attr]
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(std)))
        self._lowest = math.log(min_std)

    def std(self) -> Tensor:
        """Return the standard deviation before tanh, ``[action_dim]``, of S actors stacked ``[S, action_dim]``."""
        return self.log_std.clamp_min(self._lowest).exp()

    def offsets(self, noise: Tensor) -> Tensor:
        """Return what standard normal ``noise [..., action_dim]`` adds to the mean before tanh; of S actors it is ``[..., S, B, ...]``."""
        std = self.std()
        if std.ndim == 1:
            return std * noise
        return torch.stack([own * eps for own, eps in zip(std.unbind(0), noise.unbind(-3))], -3)  # each with the bits of its own

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return actions ``[..., action_dim]`` in (-1, 1) for latents ``[..., latent_dim]``.

        Args:
            z: Latent states.
            noise: Standard normal numbers ``[..., action_dim]``; None for the mean policy.
        """
        mean = self.network(z)
        return torch.tanh(mean if noise is None else mean + self.offsets(noise))
