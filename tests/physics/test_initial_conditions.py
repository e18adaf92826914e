"""Named initial conditions: physical, reproducible, the same in any pieces."""

from __future__ import annotations

import pytest
import torch

from ttcfast.physics import to_primitive
from ttcfast.physics.initial_conditions import PRESETS, gauss_vortices, isentropic_vortex, kelvin_helmholtz, riemann4, riemann_curved, sod


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_states_are_physical_and_reproducible(name):
    f = PRESETS[name]
    u = f(3, (24, 20), seed=11)
    assert u.shape == (3, 4, 24, 20) and u.dtype == torch.float64
    w = to_primitive(u)
    assert bool(torch.isfinite(w).all()) and float(w[:, 0].min()) > 0 and float(w[:, 3].min()) > 0
    assert torch.equal(u, f(3, (24, 20), seed=11))


@pytest.mark.parametrize("name", ["riemann4", "riemann_curved", "kelvin_helmholtz", "gauss_vortices", "richtmyer_meshkov"])
def test_pieces_make_the_whole_and_seeds_differ(name):
    f = PRESETS[name]
    grid = (96, 96)  # fine enough for the ripples of the shear layer to move a border by a cell
    whole = f(4, grid, seed=5)
    assert torch.equal(whole[2:], f(2, grid, seed=5, first=2))
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole, f(4, grid, seed=6))


def test_ranges_bound_the_states():
    w = to_primitive(riemann4(50, (2, 2), seed=0, density=(0.5, 0.6), velocity=(-0.2, 0.1), pressure=(2.0, 3.0)))
    for channel, (low, high) in enumerate([(0.5, 0.6), (-0.2, 0.1), (-0.2, 0.1), (2.0, 3.0)]):
        assert low - 1e-12 <= float(w[:, channel].min()) and float(w[:, channel].max()) <= high + 1e-12


def test_riemann_states_are_constant_on_four_patches():
    for f, patches in ((riemann4, 4), (riemann_curved, 4)):
        rho = f(1, (64, 64), seed=2)[0, 0]
        assert rho.unique().numel() == patches


def test_kelvin_helmholtz_is_two_streams():
    w = to_primitive(kelvin_helmholtz(1, (64, 64), seed=0))[0]
    assert w[0].unique().tolist() == [1.0, 2.0] and w[0, 0, 0] == 1.0 and w[0, 0, 32] == 2.0
    assert torch.allclose(w[1], torch.where(w[0] == 1.0, 0.5, -0.5).double())


def test_gauss_vortices_are_divergence_free():
    w = to_primitive(gauss_vortices(1, (64, 64), seed=1, width=(0.08, 0.1)))[0]
    ikx = 2j * torch.pi * torch.fft.fftfreq(64, 1 / 64, dtype=torch.float64)
    divergence = torch.fft.ifft2(ikx[:, None] * torch.fft.fft2(w[1]) + ikx[None] * torch.fft.fft2(w[2])).real
    vorticity = torch.fft.ifft2(ikx[:, None] * torch.fft.fft2(w[2]) - ikx[None] * torch.fft.fft2(w[1])).real
    assert float(divergence.abs().max()) < 1e-9 * float(vorticity.abs().max())


def test_the_vortex_has_uniform_entropy():
    w = to_primitive(isentropic_vortex(1, (32, 32)))[0]
    assert torch.allclose(w[3] / w[0] ** 1.4, torch.ones_like(w[0]), rtol=1e-10)


def test_sod_has_two_states_in_any_dimension():
    for shape in ((10,), (10, 4), (10, 4, 4)):
        assert sod(1, shape)[0, 0].unique().tolist() == [0.125, 1.0]


@pytest.mark.parametrize("n,grid", [(0, (8, 8)), (1, (8,)), (1, (8, 8, 8))])
def test_wrong_sizes_are_named(n, grid):
    with pytest.raises(ValueError, match="riemann4 got n"):
        riemann4(n, grid, seed=0)
