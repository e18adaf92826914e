"""Rewards as distributions over bins in symlog space (DreamerV3, arXiv:2301.04104; TD-MPC2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttcfast.checks import whole

from .layers import wide, wide_dtype


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), in float32 where ``x`` has fewer bits; its derivative at 0 is 1."""
    x = wide(x)
    side = _side(x)
    return side * (side * x).log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (e^|x| - 1), the inverse of :func:`symlog`; precision and derivative as there."""
    x = wide(x)
    side = _side(x)
    return side * (side * x).expm1()


def _side(x: Tensor) -> Tensor:
    """1 where x is at least 0 or NaN, else -1. The sign's 0 at 0 would make the derivative of sign(x) f(|x|) vanish there."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


class TwoHot(nn.Module):
    """Numbers to distributions over equally spaced bins and back, in float32 or float64: what comes in with fewer bits is widened first.

    Args:
        num_bins: at least 2.
        vmin: symlog of the lowest value.
        vmax: symlog of the highest value.

    Raises:
        ValueError: fewer than 2 bins, or vmin not below vmax.
    """

    def __init__(self, num_bins: int = 101, vmin: float = -10.0, vmax: float = 10.0) -> None:
        super().__init__()
        whole("num_bins", num_bins, 2)
        if not vmin < vmax:
            raise ValueError(f"vmin is {vmin} and vmax {vmax}; vmin must be below vmax")
        self.width = (vmax - vmin) / (num_bins - 1)
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax

    def bins(self, like: Tensor) -> Tensor:
        """Their centres ``[num_bins]``; made anew, so that they are exact in the dtype of ``like``, float32 at least."""
        return torch.linspace(self.vmin, self.vmax, self.num_bins, dtype=wide_dtype(like.dtype), device=like.device)

    def encode(self, value: Tensor) -> Tensor:
        """``[..., 1]`` -> probabilities ``[..., num_bins]``: the mass of symlog(value) split linearly between its two neighbours."""
        x = symlog(value).clamp(self.vmin, self.vmax)
        return (1 - (x - self.bins(x)).abs() / self.width).clamp_min(0)

    def decode(self, logits: Tensor) -> Tensor:
        """Logits ``[..., num_bins]`` -> the value ``[..., 1]`` whose symlog is the mean of the distribution."""
        logits = wide(logits)
        return symexp((logits.softmax(-1) * self.bins(logits)).sum(-1, keepdim=True))

    def cross_entropy(self, logits: Tensor, value: Tensor) -> Tensor:
        """Of logits ``[..., num_bins]`` against values ``[..., 1]`` -> ``[...]``."""
        return -(self.encode(value) * wide(logits).log_softmax(-1)).sum(-1)
