"""Noise on complex tensors (Fourier coefficients): both parts of a number are kept, dropped and disturbed together."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.dropouts import DropPath
from ttcfast.core.base_fm import Surrogate
from ttcfast.spec import Key, StateSpec, StochasticConfig
from ttcfast.stochastic_sampling import Draw, enable_mc_dropout, inject_latent_noise, keyed_noise, noise_sites, perturb_state

M = 6
ROWS = torch.stack([torch.zeros(M, dtype=torch.int64), torch.arange(M)], 1)


class DropBlock1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.block_size = 0.3, 3

    def forward(self, x: Tensor) -> Tensor:
        return x


class Spectral(nn.Module):
    """The identity map by way of Fourier space, where its only module stands."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.lift = inside, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(self.inside(torch.fft.rfft(x)), x.shape[-1])


def run(model: nn.Module, x: Tensor, **config: object) -> Tensor:
    sites = noise_sites(model, StochasticConfig(**config))
    with keyed_noise(model, sites, Draw.of(0, 0, ROWS)), torch.no_grad():
        return model(x)


def coefficients(dtype: torch.dtype = torch.complex64, size: int = 3000) -> Tensor:
    return torch.randn(M, 3, size, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("module", [nn.Dropout(0.3), nn.Dropout1d(0.3), DropPath(0.4), DropBlock1d()], ids=lambda m: type(m).__name__)
def test_dropout_drops_and_scales_both_parts_alike(module, dtype):
    x = coefficients(dtype)
    factor = run(nn.Sequential(module), x) / x
    assert factor.dtype == dtype and float(factor.imag.abs().max()) < 1e-5  # a real factor on every number: phases stay
    assert 0.1 < float((factor.real == 0).double().mean()) < 0.9 and float(factor.real.max()) > 1
    real = run(nn.Sequential(module), torch.ones(x.shape, dtype=x.real.dtype))
    torch.testing.assert_close(factor.real, real)  # the same draw as on a real tensor of that shape


def test_what_is_dropped_is_zero_even_where_it_is_not_finite():
    out = run(nn.Sequential(nn.Dropout(0.5)), torch.full((M, 200), complex(math.inf, math.nan)))
    assert 0.3 < float((out == 0).double().mean()) < 0.7


@pytest.mark.parametrize("name", ["latent", "injected", "injected for good"])
def test_latent_noise_and_injected_dropout_keep_the_imaginary_part(name):
    model, x = Spectral(nn.Identity()), torch.rand(M, 3, 256)
    if name == "injected for good":
        enable_mc_dropout(model, 1e-6, after=["inside"])
    config = {"latent_sigma": 1e-6, "latent_at": "inside"} if name == "latent" else {}
    config = {"dropout_p": 1e-6, "dropout_after": ["inside"]} if name == "injected" else config
    torch.testing.assert_close(run(model, x, **config), x, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(x), x, rtol=0, atol=1e-4)


def test_complex_gaussian_noise_has_variance_one_half_in_either_part():
    x = coefficients()
    noise = (run(nn.Sequential(nn.Identity()), x, latent_sigma=2.0, latent_at="0") - x) / 2
    for part in (noise.real, noise.imag):
        assert float(part.var()) == pytest.approx(0.5, rel=0.05) and float(part.mean()) == pytest.approx(0, abs=0.02)
    assert abs(float((noise.real * noise.imag).mean())) < 0.02
    keyed = inject_latent_noise(x, 2.0, key=Key(0), rows=ROWS) - x
    assert float(keyed.real.var()) == pytest.approx(2, rel=0.05) and float(keyed.imag.var()) == pytest.approx(2, rel=0.05)
    assert torch.equal(perturb_state(x.conj(), 0.0, key=Key(0), rows=ROWS), x.conj().resolve_conj())


def test_alpha_dropout_of_complex_numbers_is_refused():
    with pytest.raises(ValueError, match=r"module '0' is an alpha dropout, which is not defined for torch.complex64; use nn.Dropout"):
        run(nn.Sequential(nn.AlphaDropout(0.3)), coefficients())


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_candidates_of_a_spectral_model_do_not_depend_on_their_chunk(at_once):
    fm = Surrogate(Spectral(nn.Dropout(0.3)), StateSpec.euler1d())
    x, ids = torch.rand(2, 3, 32), torch.arange(1, 5)
    together = fm.candidates(x, ids, seed=0, step=1)
    parts = torch.cat([fm.candidates(x, own, seed=0, step=1) for own in ids.split(at_once)], 1)
    torch.testing.assert_close(parts, together)
    assert float((together - x.unsqueeze(1)).abs().max()) > 0.1
