import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttcfast.metrics import fraction_improved, sample_gain

errors = st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=20)


@given(errors)
def test_gain_is_the_plans_formula_and_agrees_with_the_fraction(pairs):
    baseline, ttc = torch.tensor(pairs, dtype=torch.float64).T
    gain = sample_gain(baseline, ttc)
    torch.testing.assert_close(gain, 100.0 * (baseline - ttc) / (baseline + 1e-12))
    assert fraction_improved(baseline, ttc) == pytest.approx(100.0 * sum(t < b for b, t in pairs) / len(pairs))


def test_no_change_is_no_gain():
    assert sample_gain(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])).tolist() == [0.0, 0.0]
    assert fraction_improved(torch.tensor([1.0]), torch.tensor([1.0])) == 0.0


def test_nan_is_the_largest_error():
    nan = torch.nan
    assert fraction_improved(torch.tensor([1.0, nan, nan]), torch.tensor([nan, 1.0, nan])) == pytest.approx(100 / 3)
    assert sample_gain(torch.tensor([1.0]), torch.tensor([nan])).isnan().all()


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"shape \(2,\) and mse_ttc \(3,\)"):
        sample_gain(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="empty"):
        fraction_improved(torch.ones(0), torch.ones(0))
