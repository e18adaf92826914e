"""Dropout modules as other packages write them, and the switches that noise must leave as it found them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """As in timm and transformers: a rate in ``drop_prob``, whole samples dropped, in training only."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1)) >= self.drop_prob
        return x * keep / (1 - self.drop_prob)


def switches_of(model: nn.Module) -> list[Any]:
    """Flags, rates, number of hooks and replaced forwards of all modules."""
    names = ("training", "p", "drop_prob", "dropout")
    return [([getattr(m, n, None) for n in names], len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()]
