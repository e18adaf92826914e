import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttcfast.core.normalizer import Normalizer


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_decode_inverts_encode_in_any_dimension(channels, n, ndim):
    g = torch.Generator().manual_seed(0)
    norm = Normalizer(torch.randn(channels, generator=g), torch.rand(channels, generator=g) + 0.1)
    x = torch.randn(n, channels, *[3] * ndim, generator=g)
    torch.testing.assert_close(norm.decode(norm.encode(x)), x)
    torch.testing.assert_close(norm.decode_delta(norm.encode_delta(x)), x)
    torch.testing.assert_close(norm.encode(x.unsqueeze(1), channel_axis=2)[:, 0], norm.encode(x))


def test_values():
    norm = Normalizer(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor([0.5, 0.1]))
    x = torch.tensor([3.0, 6.0]).reshape(1, 2, 1)
    assert norm.encode(x).flatten().tolist() == [1.0, 1.0]
    assert norm.decode_delta(torch.ones(1, 2, 1)).flatten().tolist() == pytest.approx([0.5, 0.1])
    assert set(norm.state_dict()) == {"mean", "std", "delta_std"}


def test_wrong_statistics():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"std is .* give finite values above 0"):
        Normalizer(ones, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"std has shape \(3,\) and mean \(2,\)"):
        Normalizer(ones, torch.ones(3))
    with pytest.raises(ValueError, match="x has 3 channels on axis 1"):
        Normalizer(ones, ones).encode(torch.ones(1, 3, 4))


def test_statistics_of_each_cell_and_a_mean_of_changes():
    g = torch.Generator().manual_seed(0)
    mean, std, x = torch.randn(2, 3, 4, generator=g), torch.rand(2, 3, 4, generator=g) + 0.1, torch.randn(5, 2, 3, 4, generator=g)
    norm = Normalizer(mean, std, torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(norm.encode(x), (x - mean) / std)
    torch.testing.assert_close(norm.decode(norm.encode(x)), x)
    torch.testing.assert_close(norm.decode_delta(x)[:, 1], 2 * x[:, 1] - 1)
    torch.testing.assert_close(norm.encode_delta(norm.decode_delta(x)), x)
    assert norm.num_channels == 2
    with pytest.raises(ValueError, match=r"x has cells \(4, 3\) and the normalizer statistics for each of \(3, 4\)"):
        norm.encode(x.mT)
    with pytest.raises(ValueError, match=r"std has shape .* or per cell"):
        Normalizer(mean, std.mT)


def test_differences_of_two_states_have_no_mean_change():
    norm = Normalizer(torch.zeros(2), torch.ones(2), torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]))
    first, second = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    apart = norm.decode_delta(first) - norm.decode_delta(second)
    torch.testing.assert_close((first - second) * norm.unit_of_delta(first), apart)
    assert (first.unsqueeze(1) * norm.unit_of_delta(first.unsqueeze(1), channel_axis=2)).equal(
        (first * norm.unit_of_delta(first)).unsqueeze(1)
    )
