"""The vorticity solver against exact solutions, by its order in time, and by what the flow conserves."""

import itertools
import math

import pytest
import torch

from ttcfast.physics.navier_stokes import LENGTH, VorticitySolver, random_vorticity, spectral_resampling


def grid(n):
    x = torch.arange(n, dtype=torch.float64) * (LENGTH / n)
    return torch.meshgrid(x, x, indexing="ij")


def test_a_decaying_vortex_array_is_exact():
    """Taylor and Green's: w = 2 k sin(k x) sin(k y) decays like exp(-2 k^2 nu t), its products being zero."""
    x, y = grid(32)
    for k, nu, drag in ((1, 0.1, 0.0), (3, 0.02, 0.3)):
        w0 = (2 * k * (k * x).sin() * (k * y).sin())[None, None]
        solver = VorticitySolver(viscosity=nu, drag=drag, wave_number=0, dtype=torch.float64)
        found = solver.rollout(w0, [0.0, 0.5, 2.0])
        for i, t in enumerate((0.0, 0.5, 2.0)):
            torch.testing.assert_close(found[:, i], w0 * math.exp(-(2 * k * k * nu + drag) * t), atol=1e-11, rtol=0)


def test_the_laminar_flow_of_the_forcing_is_steady():
    _, y = grid(32)
    nu, drag, k = 0.05, 0.1, 4
    laminar = (-k * (k * y).cos() / (nu * k * k + drag))[None, None]
    solver = VorticitySolver(viscosity=nu, drag=drag, wave_number=k, dtype=torch.float64)
    # The linear term is exact and the force a constant, so that only the method's fourth order stands between the two.
    torch.testing.assert_close(solver.rollout(laminar, [1.0])[:, 0], laminar, atol=1e-6, rtol=0)


def test_the_order_in_time_is_four():
    w0 = random_vorticity(1, 32, seed=0)
    errors, exact = [], VorticitySolver(viscosity=0.01, cfl=9.0, longest=1 / 512, dtype=torch.float64).rollout(w0, [0.25])
    for longest in (1 / 16, 1 / 32, 1 / 64):
        found = VorticitySolver(viscosity=0.01, cfl=9.0, longest=longest, dtype=torch.float64).rollout(w0, [0.25])
        errors.append(float((found - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert 3.5 < orders[0] < 4.6 and 3.6 < orders[1] < 4.6, (errors, orders)


def test_without_force_and_friction_energy_and_enstrophy_hardly_change():
    w0 = random_vorticity(2, 64, seed=1, peak=3, width=1)
    solver = VorticitySolver(viscosity=1e-12, drag=0.0, wave_number=0, dtype=torch.float64, cfl=0.3)
    w = solver.rollout(w0, [0.0, 0.5])
    enstrophy = (w**2).mean((-1, -2))
    torch.testing.assert_close(enstrophy[:, 1], enstrophy[:, 0], rtol=1e-5, atol=0)
    assert float(w.mean((-1, -2)).abs().max()) < 1e-13


def test_a_problem_does_not_depend_on_its_batch_and_the_flow_on_shifts_along_x():
    w0, solver = random_vorticity(3, 32, seed=2), VorticitySolver(dtype=torch.float64)
    w0[1] *= 3
    together = solver.rollout(w0, [0.5, 1.0])
    torch.testing.assert_close(solver.rollout(w0[1:2], [0.5, 1.0]), together[1:2], atol=1e-10, rtol=0)
    torch.testing.assert_close(solver.rollout(w0.roll(5, 2), [0.5, 1.0]), together.roll(5, 3), atol=1e-9, rtol=0)


def test_resampling_keeps_long_waves_and_drops_short_ones():
    x, y = grid(64)
    long, short = (3 * x).cos() * (5 * y).sin(), (20 * x).cos() + (17 * y).sin()
    coarse = spectral_resampling(long + short, 32)
    x, y = grid(32)
    torch.testing.assert_close(coarse, (3 * x).cos() * (5 * y).sin(), atol=1e-12, rtol=0)
    assert spectral_resampling(long, 64) is long
    fine = spectral_resampling(coarse, 128)
    torch.testing.assert_close(spectral_resampling(fine, 32), coarse, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="cells is 31 for 64 cells; give even numbers"):
        spectral_resampling(long, 31)


def test_starts_are_keyed_and_have_the_size_asked_for():
    whole = random_vorticity(4, 32, seed=5, rms=2.0)
    assert torch.equal(whole[2:], random_vorticity(2, 32, seed=5, first=2, rms=2.0))
    torch.testing.assert_close((whole**2).mean((1, 2, 3)).sqrt(), torch.full((4,), 2.0, dtype=torch.float64))
    assert float(whole.mean((2, 3)).abs().max()) < 1e-12


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VorticitySolver(viscosity=0.0), "viscosity is 0.0; give a number above 0"),
        (lambda: VorticitySolver(drag=-1.0), "drag is -1.0"),
        (lambda: VorticitySolver(dtype=torch.float16), "dtype is torch.float16"),
        (lambda: VorticitySolver().rollout(torch.zeros(1, 2, 8, 8), [1.0]), r"expected vorticity \[N, 1, n, n\]"),
        (lambda: VorticitySolver().rollout(torch.zeros(1, 1, 10, 10), [1.0, 0.5]), "ascending from 0"),
        (lambda: VorticitySolver(wave_number=1.5), "wave_number is 1.5"),
        (
            lambda: VorticitySolver(wave_number=6).rollout(torch.zeros(1, 1, 12, 12), [1.0]),
            "wave_number is 6, which a grid of 12",
        ),
        (lambda: VorticitySolver(wave_number=6).rate(torch.zeros(1, 1, 12, 12)), "give more than 12$"),
    ],
)
def test_wrong_arguments_are_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
