"""Computes the step up a differentiable reward that closes the gap to its known maximum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttcfast.stochastic_sampling.row_axis import over


def polyak_move(score: Callable[[Tensor], Tensor], candidates: Tensor, scale: Tensor, maximum: float, name: str) -> Tensor:
    """Returns the smallest displacement of each candidate that reaches the reward's maximum to first order.

    With ``g = scale * gradient`` it is ``scale * (maximum - score) g / |g|^2``, smallest in units of ``scale``. It is 0 for a candidate
    whose score or gradient is not finite, or whose gradient is 0.

    Args:
        score: Function from candidates ``[N, B, C, *S]`` to scores ``[N, B]``, each of which depends on its own candidate only.
        candidates: Candidates to start from.
        scale: Unit of each channel; broadcasts to the candidates.
        maximum: Upper bound of the score.
        name: Name of the reward in errors.

    Returns:
        Displacements ``[N, B, C, *S]`` in the candidates' dtype.

    Raises:
        ValueError: The reward is not differentiable.

    Source: Polyak, Introduction to Optimization, 1987 (the step for a known optimum).
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
    return torch.where(over(useful, candidates), scale * direction * over(length, candidates), 0.0)


def channel_spread(state: Tensor) -> Tensor:
    """Returns each channel's standard deviation over cells, ``[N, C, 1, ...]`` for states ``[N, C, *S]``.

    It is at least a thousandth of the largest channel's root mean square, so that dividing by it is safe.
    """
    cells = state.flatten(2)
    floor = 1e-3 * cells.square().mean(2).sqrt().amax(1, keepdim=True)
    spread = torch.maximum(cells.std(2, correction=0), floor)
    return over(spread, state)
