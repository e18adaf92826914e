"""How far latents are from the simplices that SimNorm puts them on."""

from __future__ import annotations

from torch import Tensor


def simplex_distance(z: Tensor, group: int) -> Tensor:
    """Mean over groups of ``|sum - 1|`` plus what is negative; 0 on the product of simplices.

    Args:
        z: latents ``[..., D]``.
        group: entries per simplex; 0: there are none, and the distance is 0.

    Returns:
        A scalar tensor.
    """
    if not group:
        return z.new_zeros(())
    groups = z.unflatten(-1, (-1, group))
    return ((groups.sum(-1) - 1).abs() + groups.clamp_max(0).abs().sum(-1)).mean()
