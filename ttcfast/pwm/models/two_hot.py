"""Rewards as distributions over bins in symlog space, as in DreamerV3 (Hafner et al., 2023) and TD-MPC2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ttcfast.checks import whole

from .layers import wide


def symlog(x: Tensor) -> Tensor:
    """Return ``sign(x) log(1 + |x|)`` in at least float32; its derivative at 0 is 1."""
    return _odd(torch.log1p, x)


def symexp(x: Tensor) -> Tensor:
    """Return ``sign(x) (e^|x| - 1)``, the inverse of :func:`symlog`, in at least float32; its derivative at 0 is 1."""
    return _odd(torch.expm1, x)


def _odd(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``sign(x) f(|x|)`` with sign 1 at 0, since the sign 0 would make the derivative vanish there."""
    x = wide(x)
    side = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    return side * f(side * x)


class TwoHot(nn.Module):
    """Converts numbers to distributions over equally spaced bins and back, in at least float32.

    Args:
        num_bins: Number of bins, at least 2.
        vmin: Symlog of the lowest value.
        vmax: Symlog of the highest value.

    Raises:
        ValueError: There are fewer than 2 bins, or vmin is not below vmax.
    """

    def __init__(self, num_bins: int = 101, vmin: float = -10.0, vmax: float = 10.0) -> None:
        super().__init__()
        whole("num_bins", num_bins, 2)
        if not vmin < vmax:
            raise ValueError(f"vmin is {vmin} and vmax {vmax}; vmin must be below vmax")
        self.width = (vmax - vmin) / (num_bins - 1)
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax

    def bins(self, like: Tensor) -> Tensor:
        """Return the centres of the bins, ``[num_bins]``, exact in the dtype of ``like``."""
        return torch.linspace(self.vmin, self.vmax, self.num_bins, dtype=like.dtype, device=like.device)

    def encode(self, value: Tensor) -> Tensor:
        """Split the mass of symlog(value) linearly between its two neighbours: ``[..., 1]`` to probabilities ``[..., num_bins]``."""
        x = symlog(value).clamp(self.vmin, self.vmax)
        return (1 - (x - self.bins(x)).abs() / self.width).clamp_min(0)

    def decode(self, logits: Tensor) -> Tensor:
        """Return the value ``[..., 1]`` whose symlog is the mean of the distribution with logits ``[..., num_bins]``."""
        logits = wide(logits)
        return symexp((logits.softmax(-1) * self.bins(logits)).sum(-1, keepdim=True))

    def cross_entropy(self, logits: Tensor, value: Tensor) -> Tensor:
        """Return the cross-entropy ``[...]`` of logits ``[..., num_bins]`` against values ``[..., 1]``."""
        return -(self.encode(value) * wide(logits).log_softmax(-1)).sum(-1)
