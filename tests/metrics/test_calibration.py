import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ttcfast.metrics import calibration


def test_a_perfect_score_ranks_every_error():
    error = torch.rand(200, generator=torch.Generator().manual_seed(0))
    c = calibration(-error, error)
    assert c.rank_correlation == pytest.approx(-1)
    assert c.count.tolist() == [20] * 10
    assert bool((c.error.diff() < 0).all()) and bool((c.score.diff() > 0).all())
    torch.testing.assert_close(c.score, -c.error)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30))
def test_rank_correlation_shares_ranks_among_ties(pairs):
    s, e = torch.tensor(pairs, dtype=torch.float64).T
    ours = calibration(s, e, bins=3).rank_correlation
    if s.unique().numel() == 1 or e.unique().numel() == 1:
        assert ours != ours
    else:
        assert ours == pytest.approx(spearmanr(s.numpy(), e.numpy()).statistic, abs=1e-9)


def test_what_is_not_finite_is_dropped_and_counted():
    c = calibration(torch.tensor([1.0, -torch.inf, 2.0, 3.0]), torch.tensor([1.0, 1.0, torch.nan, 0.5]), bins=10)
    assert c.dropped == 2 and c.count.tolist() == [1, 1]


def test_wrong_input():
    with pytest.raises(ValueError, match="one error per score"):
        calibration(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="bins is 0"):
        calibration(torch.ones(3), torch.ones(3), bins=0)
    with pytest.raises(ValueError, match="none of the 2 pairs"):
        calibration(torch.full((2,), torch.nan), torch.ones(2))
