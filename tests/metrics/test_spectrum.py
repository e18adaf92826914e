"""Variance by scale: single waves fall into their octave, and all octaves add up to the variance."""

import math

import pytest
import torch

from ttcfast.metrics import band_variances


@pytest.mark.parametrize("wave, band", [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3)])
def test_a_wave_has_its_variance_in_its_octave(wave, band):
    y = torch.arange(16) / 16 * 2 * math.pi
    field = 5 + 3 * torch.sin(wave * y).expand(2, 16, 16)
    found = band_variances(field, 2)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[:, band] = field.double().flatten(1).var(1, correction=0)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("shape", [(16,), (12, 20), (8, 8, 8), (7, 9)])
def test_the_octaves_add_up_to_the_variance(shape):
    x = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(0))
    total = x.double().flatten(2).var(2, correction=0)
    torch.testing.assert_close(band_variances(x, len(shape)).sum(-1), total)
