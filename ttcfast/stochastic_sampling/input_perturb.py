"""Gaussian noise on a state."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ttcfast.checks import at_least
from ttcfast.ops.add_noise import add_noise
from ttcfast.spec import Key


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
    """Returns ``x + eps * N(0, 1)`` in the dtype of ``x`` and on its device: a new, detached tensor.

    The normal of a complex entry is complex with variance 1, as in ``torch.randn``.

    Args:
        x: Floating-point or complex tensor of any shape.
        eps: Standard deviation in the units of ``x``, non-negative.
        generator: Generator on the device of ``x``; None means torch's default.
        key: Key of the noise, which then depends only on it and on the (problem, candidate) of each entry of the first axis; see
            ``ttcfast.ops.add_noise``. None draws from ``generator``.
        rows: (problem, candidate) of each entry of the first axis, int64 ``[M, 2]``; None means candidates 0, 1, ... of problem 0.
        antithetic: Whether candidates 2, 4, ... take the opposite noise of the one before.

    Raises:
        TypeError: ``key`` is not a ``Key``.
        ValueError: ``eps`` is negative, ``generator`` is combined with ``key``, ``rows`` is given without ``key``, or rows do not match.

    Source: TTC plan, "Stochasticity at Test Time"; docs/design/decisions.md ("Keyed candidates").
    """
    at_least("eps", eps, 0)
    if key is None:
        if rows is not None or antithetic:
            raise ValueError("rows and antithetic belong to keyed noise and key is None; give key=Key(seed, step, site)")
        return torch.add(x, torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator), alpha=eps)
    if generator is not None:
        raise ValueError("both generator and key are given; noise is drawn in sequence by the one or keyed by the other; give one")
    if x.ndim == 0:
        raise ValueError("a keyed draw has one row for each entry of the first axis, and a tensor without axes has none")
    if rows is None:
        rows = torch.stack([torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))], 1).to(x.device)
    if x.is_complex():  # half of the variance in each part
        parts = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(add_noise(parts, 1, eps / math.sqrt(2), key=key, rows=rows, antithetic=antithetic).squeeze(1))
    return add_noise(x, 1, eps, key=key, rows=rows, antithetic=antithetic).squeeze(1)
