"""The step that raises a differentiable reward by what it lacks to its maximum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def polyak_move(score: Callable[[Tensor], Tensor], candidates: Tensor, scale: Tensor, maximum: float, name: str) -> Tensor:
    """The smallest move of each candidate that reaches the reward's maximum to first order (Polyak's step for a known optimum).

    With ``g = scale * gradient`` the move is ``scale * (maximum - score) g / |g|^2``, smallest in units of ``scale``. A candidate whose
    score or gradient is not finite, or whose gradient is 0, is not moved.

    Args:
        score: candidates ``[N, B, C, *S]`` -> scores ``[N, B]``, each of its own candidate alone.
        candidates: where to start.
        scale: units of a channel, broadcasts to the candidates.
        maximum: the largest value that a score can take.
        name: of the reward, for the error.

    Returns:
        ``[N, B, C, *S]`` in the candidates' dtype.

    Raises:
        ValueError: the reward is not differentiable.
    """
    with torch.enable_grad():
        moved = candidates.detach().requires_grad_()
        scores = score(moved)
        if not scores.requires_grad:
            raise ValueError(f"{name} is not differentiable in the candidates, so they cannot be moved along it; use refine_steps=0")
        (gradient,) = torch.autograd.grad(torch.where(scores.isfinite(), scores, 0.0).sum(), moved)
    direction = scale * gradient
    gap = maximum - scores.detach().double()
    size = direction.double().square().flatten(2).sum(2)
    useful = gap.isfinite() & size.isfinite() & (size > 0)
    length = torch.where(useful, gap / size, 0.0).to(candidates.dtype)
    axes = [1] * (candidates.ndim - 2)
    return torch.where(useful.reshape(*useful.shape, *axes), scale * direction * length.reshape(*length.shape, *axes), 0.0)


def channel_spread(state: Tensor) -> Tensor:
    """Standard deviation over cells of each channel, ``[N, C, 1, ...]`` of ``[N, C, *S]``: units in which channels can be compared.

    A channel that hardly varies gets a thousandth of the state's largest channel, so that dividing by it is safe.
    """
    cells = state.flatten(2)
    floor = 1e-3 * cells.square().mean(2).sqrt().amax(1, keepdim=True)
    spread = torch.maximum(cells.std(2, correction=0), floor)
    return spread.reshape(*spread.shape, *[1] * (state.ndim - 2))
