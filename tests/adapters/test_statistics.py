"""Statistics that broadcast, without the packages they come from."""

from types import SimpleNamespace

import pytest
import torch

from ttcfast.adapters import normalizer


def stats(*shape, eps=0.0):
    return SimpleNamespace(mean=torch.full(shape, 2.0), std=torch.full(shape, 3.0), eps=eps)


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [((1, 2, 1, 1), None, (2,)), ((1, 2, 4, 5), None, (2, 4, 5)), ((), 3, (3,)), ((1, 1, 1, 1), 3, (3,)), ((1, 1, 4, 5), 2, (2, 4, 5))],
)
def test_shapes_that_broadcast(shape, channels, expected):
    norm = normalizer(stats(*shape, eps=0.5), channels=channels)
    assert norm.mean.shape == norm.std.shape == expected
    x = torch.randn(2, expected[0], 4, 5)
    torch.testing.assert_close(norm.encode(x), (x - 2) / 3.5)


def test_wrong_statistics():
    with pytest.raises(ValueError, match="say how many there are by channels="):
        normalizer(stats())
    with pytest.raises(ValueError, match="its first axis is that of the batch"):
        normalizer(stats(2, 3, 1, 1))
    with pytest.raises(ValueError, match="mean has 2 channels and channels is 3"):
        normalizer(stats(1, 2, 1, 1), channels=3)
    with pytest.raises(TypeError, match="source is a int; give a UnitGaussianNormalizer"):
        normalizer(3)
    with pytest.raises(ValueError, match="has neither in_normalizer nor out_normalizer"):
        normalizer(SimpleNamespace(in_normalizer=None, out_normalizer=None))
