"""Gaussian noise on a tensor, from a sequence of draws or by key."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ttcfast.ops.add_noise import add_noise
from ttcfast.spec import Key


def add_gaussian(x: Tensor, sigma: float, generator: Generator | None, key: Key | None, rows: Tensor | None, antithetic: bool) -> Tensor:
    """``x + sigma * N(0, 1)``; the arguments and errors of ``perturb_state``, which names the scale."""
    if key is None:
        if rows is not None or antithetic:
            raise ValueError("rows and antithetic belong to keyed noise and key is None; give key=Key(seed, step, site)")
        return torch.add(x, torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator), alpha=sigma)
    if generator is not None:
        raise ValueError("both generator and key are given; noise is drawn in sequence by the one or keyed by the other")
    if x.ndim == 0:
        raise ValueError("a keyed draw has one row for each entry of the first axis, and a tensor without axes has none")
    if rows is None:
        rows = torch.stack([torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))], 1).to(x.device)
    if x.is_complex():  # of variance 1, half of it in either part, as torch.randn draws it
        parts = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(add_noise(parts, 1, sigma / math.sqrt(2), key=key, rows=rows, antithetic=antithetic).squeeze(1))
    return add_noise(x, 1, sigma, key=key, rows=rows, antithetic=antithetic).squeeze(1)
