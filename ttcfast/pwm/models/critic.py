"""The critic of an agent: an ensemble of value functions evaluated as one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.checks import whole
from ttcfast.ops import MLP, mlp


class CriticEnsemble(nn.Module):
    """Several independent value functions of latent states, MLPs of Linear, LayerNorm and Mish.

    Args:
        latent_dim: Size of a latent state.
        units: Sizes of the hidden layers, at least one.
        members: Number of value functions.

    Raises:
        ValueError: A size is below 1, or there is no hidden layer.
    """

    def __init__(self, latent_dim: int, *, units: Sequence[int] = (400, 200), members: int = 3) -> None:
        super().__init__()
        whole("members", members, 1)
        if not units:
            raise ValueError("units is empty; give the size of at least one hidden layer")
        sizes = (latent_dim, *units, 1)
        for size in sizes:
            whole("size of a layer", size, 1)
        self.members = members
        self.weights = nn.ParameterList(torch.empty(members, i, o) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(members, 1, o) for o in sizes[1:])
        self.scales = nn.ParameterList(torch.ones(members, 1, o) for o in units)
        self.shifts = nn.ParameterList(torch.zeros(members, 1, o) for o in units)
        for place, weight in enumerate(self.weights):
            for member in weight:
                nn.init.orthogonal_(member, gain=math.sqrt(2) if place < len(units) else 0.01)

    def forward(self, z: Tensor) -> Tensor:
        """Return the values of latents ``[..., latent_dim]`` by every member, ``[members, ...]``.

        Of S ensembles stacked, whose latents are ``[..., S, B, latent_dim]``, they are ``[members, ..., S, B]``.
        """
        lists: Any = self.weights, self.biases, self.scales, self.shifts
        weights, *rows = ([*part._parameters.values()] for part in lists)  # lists of parameters are slow to read
        if weights[0].ndim == 3:
            x = z.reshape(-1, z.shape[-1]).expand(self.members, -1, -1)
            network = MLP([w.mT for w in weights], *([p.squeeze(1) for p in part] for part in rows))
            return mlp(x.contiguous(), network).reshape(self.members, *z.shape[:-1])
        by_set = z.movedim(-3, 0)
        x = by_set.flatten(1, -2).unsqueeze(1).expand(-1, self.members, -1, -1).flatten(0, 1)  # [S members, N, latent_dim]
        network = MLP([w.mT.flatten(0, 1) for w in weights], *([p.squeeze(2).flatten(0, 1) for p in part] for part in rows))
        return mlp(x, network).reshape(len(by_set), self.members, *by_set.shape[1:-1]).movedim(0, -2)
