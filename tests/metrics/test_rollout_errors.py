import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ttcfast.metrics import nrmse, relative_l1, rollout_mse, vrmse

METRICS = [rollout_mse, nrmse, vrmse, relative_l1]


def pair(n=2, frames=4, channels=3, space=(5, 6), seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, frames, channels, *space, generator=g) + 0.5
    return truth + 0.1 * torch.randn(truth.shape, generator=g), truth


@pytest.mark.parametrize("metric", METRICS)
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 4))
def test_shapes_follow_the_trajectory_and_a_perfect_rollout_has_no_error(metric, n, frames, channels, ndim, size):
    pred, truth = pair(n, frames, channels, (size,) * ndim)
    assert metric(pred, truth, ndim=ndim).shape == (n, frames)
    assert metric(pred, truth, ndim=ndim, per_channel=True).shape == (n, frames, channels)
    single = metric(pred[0].transpose(0, 1), truth[0].transpose(0, 1), ndim=ndim)
    torch.testing.assert_close(single, metric(pred, truth, ndim=ndim)[0])
    assert metric(truth, truth, ndim=ndim).abs().max() == 0


def test_values_equal_the_formulas():
    pred, truth = pair()
    p, t = pred.double(), truth.double()
    space = (-2, -1)
    mse = ((p - t) ** 2).mean(space)
    torch.testing.assert_close(rollout_mse(pred, truth), mse.mean(-1))
    torch.testing.assert_close(nrmse(pred, truth), (mse / ((t**2).mean(space) + 1e-7)).sqrt().mean(-1))
    torch.testing.assert_close(vrmse(pred, truth, per_channel=True), (mse / (t.std(space) ** 2 + 1e-7)).sqrt())
    torch.testing.assert_close(relative_l1(pred, truth), (p - t).abs().sum((-3, -2, -1)) / t.abs().sum((-3, -2, -1)))
    torch.testing.assert_close(relative_l1(pred, truth, per_channel=True), (p - t).abs().sum(space) / t.abs().sum(space))


def test_predicting_the_mean_of_the_field_has_a_vrmse_of_one():
    _, truth = pair(space=(64, 64))
    constant = truth.mean((-2, -1), keepdim=True).expand_as(truth)
    torch.testing.assert_close(vrmse(constant, truth), torch.ones(2, 4, dtype=torch.float64), atol=1e-3, rtol=0)


def test_scale_and_mean_act_per_channel():
    pred, truth = pair()
    scale, mean = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.2, 0.3])
    by_hand = rollout_mse(pred / scale[:, None, None], truth / scale[:, None, None])
    torch.testing.assert_close(rollout_mse(pred, truth, scale=scale), by_hand, rtol=1e-5, atol=0)
    torch.testing.assert_close(rollout_mse(pred, truth, scale=2.0) * 4, rollout_mse(pred, truth))
    shifted = [(x - mean[:, None, None]) / scale[:, None, None] for x in (pred, truth)]
    torch.testing.assert_close(relative_l1(pred, truth, mean=mean, scale=scale), relative_l1(*shifted), rtol=1e-5, atol=0)


def test_a_small_error_on_a_large_field_is_summed_in_float64():
    truth = torch.full((1, 1, 1, 512, 512), 1000.0)
    pred = truth.clone()
    pred[..., 0, 0] += 1.0
    assert rollout_mse(pred, truth).item() == 1.0 / 512**2


def test_metrics_stop_where_the_truth_does():
    pred, truth = pair()
    torch.testing.assert_close(rollout_mse(pred, truth[:, :2]), rollout_mse(pred, truth)[:, :2])
    with pytest.raises(ValueError, match="pred has 2 frames and truth 4; cut the truth"):
        rollout_mse(pred[:, :2], truth)


def test_nan_shows_in_its_own_frame_only():
    pred, truth = pair()
    pred[1, 2, 0, 0, 0] = torch.nan
    assert rollout_mse(pred, truth).isnan().nonzero().tolist() == [[1, 2]]


def test_wrong_input_says_what_was_given():
    pred, truth = pair()
    with pytest.raises(ValueError, match=r"pred has shape \(3, 5, 6\)"):
        rollout_mse(pred[0, 0], truth)
    with pytest.raises(ValueError, match="all but the time axis must agree"):
        rollout_mse(pred[:, :, :2], truth)
    with pytest.raises(ValueError, match="scale has 2 values"):
        rollout_mse(pred, truth, scale=torch.ones(2))
    with pytest.raises(ValueError, match="must be positive"):
        rollout_mse(pred, truth, scale=0.0)
