"""Rewards as distributions over bins in symlog space (DreamerV3, arXiv:2301.04104; TD-MPC2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ttcfast.spec import whole


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|)"""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """sign(x) (e^|x| - 1), the inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


class TwoHot(nn.Module):
    """Numbers to distributions over equally spaced bins and back.

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
        """Their centres ``[num_bins]``; made anew, so that they are exact in the dtype of ``like``."""
        return torch.linspace(self.vmin, self.vmax, self.num_bins, dtype=like.dtype, device=like.device)

    def encode(self, value: Tensor) -> Tensor:
        """``[..., 1]`` -> probabilities ``[..., num_bins]``: the mass of symlog(value) split linearly between its two neighbours."""
        x = symlog(value).clamp(self.vmin, self.vmax)
        return (1 - (x - self.bins(x)).abs() / self.width).clamp_min(0)

    def decode(self, logits: Tensor) -> Tensor:
        """Logits ``[..., num_bins]`` -> the value ``[..., 1]`` whose symlog is the mean of the distribution."""
        return symexp((logits.softmax(-1) * self.bins(logits)).sum(-1, keepdim=True))

    def cross_entropy(self, logits: Tensor, value: Tensor) -> Tensor:
        """Of logits ``[..., num_bins]`` against values ``[..., 1]`` -> ``[...]``."""
        return -(self.encode(value) * logits.log_softmax(-1)).sum(-1)
