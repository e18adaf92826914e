import pytest
import torch

from ttcfast.data.statistics import Statistics
from ttcfast.runtime.errors import DataError
from ttcfast.spec import StateSpec


def test_a_channel_that_does_not_vary_is_named():
    ones = torch.ones(4, dtype=torch.float64)
    Statistics(ones, ones, 0 * ones, 1e-5 * ones).require_variation(StateSpec(), "here")
    still = torch.tensor([1.0, 1e-9, 1.0, 1.0], dtype=torch.float64)  # what rounding leaves of a constant 1
    with pytest.raises(DataError, match=r"channel 1 \(momentum 0\) of here is constant .* give trajectories in which it varies"):
        Statistics(ones, still, ones, ones).require_variation(StateSpec(), "here")
    frozen = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(DataError, match=r"channel 3 \(energy\) of here does not change in time"):
        Statistics(ones, ones, 0 * ones, frozen).require_variation(StateSpec(), "here")
