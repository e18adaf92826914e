"""Gaussian noise on a state."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ttcfast.checks import at_least
from ttcfast.spec import Key

from .gaussian import add_gaussian


@torch.no_grad()
def perturb_state(
    x: Tensor,
    eps: float,
    *,
    generator: Generator | None = None,
    key: Key | None = None,
    rows: Tensor | None = None,
    antithetic: bool = False,
) -> Tensor:
    """``x + eps * N(0, 1)``, drawn in the state's dtype on its device; a new tensor, without gradient.

    Args:
        x: any shape, floating point.
        eps: standard deviation in the units of ``x``, at least 0.
        generator: source of randomness on the state's device; None takes torch's own.
        key, rows, antithetic: noise that depends on (seed, step, site) and on the (problem, candidate) of each entry of the first axis
            alone, as in ``ttcfast.ops.add_noise``; ``rows`` of None counts candidates from 0 in problem 0.

    Raises:
        TypeError: ``key`` is not a ``Key``.
        ValueError: ``eps`` is negative, a generator beside a key, rows without a key, or rows that do not fit.

    Source: seeds/ttc-integration-plan.md section 3C.
    """
    at_least("eps", eps, 0)
    return add_gaussian(x, eps, generator, key, rows, antithetic)
