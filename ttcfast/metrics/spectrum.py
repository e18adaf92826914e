"""How much of a field's variance lies at which scales."""

from __future__ import annotations

import torch
from torch import Tensor


def band_variances(x: Tensor, ndim: int) -> Tensor:
    """Return the variance of fields in octaves of wavelength, which adds up to their variance over cells.

    Waves with ``2^j <= |k| < 2^(j+1)`` periods per domain are in band j; the last band also holds those in the corners of the grid. Fields
    that are not periodic have a jump at the boundary, whose waves are counted, too.

    Args:
        x: ``[..., *S]`` with ``ndim`` space axes.
        ndim: Number of space axes.

    Returns:
        float64 ``[..., bands]``, with ``floor(log2(n / 2)) + 1`` bands for the longest axis of n cells.
    """
    axes, shape = list(range(-ndim, 0)), x.shape[-ndim:]
    power = torch.fft.fftn(x.double(), dim=axes).abs().square() / shape.numel() ** 2
    squares = torch.zeros(shape, dtype=torch.float64, device=x.device)
    for axis, n in enumerate(shape):
        waves = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64, device=x.device)
        squares += waves.square().reshape(-1, *[1] * (ndim - 1 - axis))
    count = max(1, (max(shape) // 2).bit_length())
    band = squares.clamp_min(1).sqrt().log2().floor().long().clamp_max(count - 1).flatten()
    power = torch.where(squares > 0, power, 0.0).flatten(-ndim)
    found = power.new_zeros(*power.shape[:-1], count)
    return found.index_add_(-1, band, power)
