import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ttcfast.stochastic_sampling import DeterministicModelError, inject_latent_noise, latent_noise, perturb_state, require_distinct

BOTH = [inject_latent_noise, perturb_state]


@pytest.mark.parametrize("noise", BOTH)
@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(1, 5), max_size=4),
    st.floats(0, 10),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_noise_is_gaussian_of_the_given_scale_and_follows_its_generator(noise, shape, scale, seed, dtype):
    x = torch.ones(shape, dtype=dtype)
    out = noise(x, scale, generator=torch.Generator().manual_seed(seed))
    z = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    assert out.dtype == dtype and torch.equal(out, torch.add(x, z, alpha=scale))


@pytest.mark.parametrize("noise", BOTH)
def test_noise_has_the_deviation_asked_for_and_no_gradient(noise):
    torch.manual_seed(0)
    x = torch.zeros(100_000, requires_grad=True)
    out = noise(x, 0.5)
    assert not out.requires_grad
    assert out.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(noise(x, 0.0), x)


@pytest.mark.parametrize("noise", BOTH)
def test_a_negative_scale_is_refused(noise):
    with pytest.raises(ValueError, match="is -1"):
        noise(torch.zeros(2), -1)


def test_latent_noise_acts_inside_the_block_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    x = torch.ones(2, 3)
    clean = model(x)
    with latent_noise(model, "0", 0.1):
        assert not torch.equal(model(x), clean)
    assert torch.equal(model(x), clean)
    with pytest.raises(ValueError, match="the latent module is 'z', which Sequential does not have"), latent_noise(model, "z", 0.1):
        pass


def test_candidates_that_are_all_the_same_raise():
    x = torch.rand(2, 1, 4, 3, 3).expand(2, 5, 4, 3, 3)
    with pytest.raises(
        DeterministicModelError, match="Linear stays deterministic: 5 candidates of a step are all the same; set a dropout rate"
    ):
        require_distinct(x, nn.Linear(1, 1))
    with pytest.raises(DeterministicModelError):
        require_distinct(x + 1e-7 * torch.rand(2, 5, 4, 3, 3), nn.Linear(1, 1))  # rounding is no difference


@pytest.mark.parametrize("problem, candidate", [(0, 1), (1, 4)])
def test_one_candidate_of_one_problem_that_differs_is_enough(problem, candidate):
    x = torch.rand(2, 1, 4, 3, 3).repeat(1, 5, 1, 1, 1)
    x[problem, candidate, 0, 0, 0] += 1e-3
    require_distinct(x, None)
    x[problem, candidate, 0, 0, 0] = torch.nan
    require_distinct(x, None)
    require_distinct(x[:, :1], None)


def test_rounding_is_measured_per_problem_and_channel():
    x = torch.ones(2, 3, 4, 3, 3)
    x[:, :, 3] = 1e5  # an energy, beside which a density of 1 has no say
    x[:, 1, 0] += 1e-4
    require_distinct(x, None)
    x = torch.ones(2, 3, 4, 3, 3)
    x[0] = 1e12  # a problem that blows up
    x[1, 1] += 1e-4
    require_distinct(x, None)
