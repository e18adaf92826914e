"""Heun and Euler: order of accuracy, the reference solver, and what must hold whatever the velocity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchdiffeq
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ttcfast
from ttcfast.integrators import Euler, Heun, integrate, make

METHODS = {"heun": ("heun2", 2), "euler": ("euler", 1)}


def forced(z: Tensor, tau: float) -> Tensor:
    """dz/dt = -2 z + sin 3t, whose solution is known."""
    return -2 * z + math.sin(3 * tau)


def forced_solution(z0: float, t: float) -> float:
    particular = (2 * math.sin(3 * t) - 3 * math.cos(3 * t)) / 13
    return (z0 + 3 / 13) * math.exp(-2 * t) + particular


def curved(z: Tensor, tau: float) -> Tensor:
    return torch.tanh(z.roll(1, -1) - (1 + tau) * z)


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_with_the_order_of_the_method(method):
    z0 = torch.tensor([0.7], dtype=torch.float64)
    errors = [abs(integrate(forced, z0, method=method, substeps=k).item() - forced_solution(0.7, 1)) for k in (16, 32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([make(method, 1).order] * 3, abs=0.06)
    assert make(method, 1).order == METHODS[method][1]


@pytest.mark.parametrize("substeps", [1, 2, 3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_equal_to_torchdiffeq(method, substeps):
    z = torch.randn(5, 6, dtype=torch.float64)
    grid = torch.linspace(0, 1, substeps + 1, dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, y: curved(y, float(t)), z, grid, method=METHODS[method][0])[-1]
    assert (integrate(curved, z, method=method, substeps=substeps) - theirs).abs().max() < 1e-12


@given(substeps=st.integers(1, 9), method=st.sampled_from(sorted(METHODS)), seed=st.integers(0, 99))
def test_zero_velocity_is_the_identity(substeps, method, seed):
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(integrate(lambda z, tau: torch.zeros_like(z), z, method=method, substeps=substeps), z)


@given(substeps=st.integers(1, 9), method=st.sampled_from(sorted(METHODS)))
def test_constant_velocity_is_followed_exactly(substeps, method):
    z, v = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(integrate(lambda z, tau: v.expand_as(z).clone(), z, method=method, substeps=substeps), z + v)


def test_heun_is_exact_for_a_velocity_linear_in_time():
    z = torch.zeros(1, dtype=torch.float64)
    assert integrate(lambda z, tau: torch.full_like(z, 2 * tau), z, substeps=1).item() == 1


def test_backwards_in_time_returns_to_the_start():
    z = torch.randn(3, 4, dtype=torch.float64)
    there = integrate(curved, z, substeps=64)
    back = integrate(curved, there, substeps=64, start=1.0, end=0.0)
    assert (there - z).abs().max() > 0.1 and (back - z).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_gradient_through_the_steps(method):
    z, a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64, requires_grad=True)

    def stepped(z: Tensor, a: Tensor) -> Tensor:
        return integrate(lambda z, tau: torch.tanh(a * z + tau), z, method=method, substeps=3)

    assert torch.autograd.gradcheck(stepped, (z, a)) and torch.autograd.gradgradcheck(stepped, (z, a))


@pytest.mark.parametrize("integrator", [Heun(3), Euler(3)], ids=lambda i: i.name)
def test_evaluations_are_what_is_evaluated(integrator):
    asked: list[float] = []

    def velocity(z: Tensor, tau: float) -> Tensor:
        asked.append(tau)
        return z

    integrator(velocity, torch.ones(1))
    assert len(asked) == integrator.evaluations
    assert sorted(set(asked)) == pytest.approx(integrator.times())


def test_no_time_lies_beyond_the_end():
    asked: list[float] = []

    def velocity(z: Tensor, tau: float) -> Tensor:
        asked.append(tau)
        return z

    for substeps in range(1, 100):
        Heun(substeps)(velocity, torch.ones(1))
        assert asked[-1] == 1
    assert min(asked) == 0 and max(asked) == 1


def test_short_names():
    assert ttcfast.integrate is integrate
    assert ttcfast.integrators.Heun is Heun
    assert make("heun2", 4) == Heun(4)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("substeps is 0; it must be at least 1", lambda: Heun(0)),
        ("substeps is 1.5; give a whole number", lambda: Euler(1.5)),
        ("method is 'rk4'; it must be one of 'heun', 'heun2', 'euler'", lambda: integrate(forced, torch.ones(1), method="rk4")),
        ("end is a tensor to be differentiated", lambda: integrate(forced, torch.ones(1), end=torch.ones((), requires_grad=True))),
        ("start is a tensor to be differentiated", lambda: Euler(1)(forced, torch.ones(1), start=torch.zeros((), requires_grad=True))),
        (r"k1 is torch.float32 \(2,\)", lambda: integrate(lambda z, tau: torch.ones(2), torch.ones(3))),
    ],
)
def test_wrong_input_gives_one_clear_line(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_the_loop_is_captured_as_one_graph():
    z = torch.randn(16, 8, device="cuda")
    weight = torch.randn(8, 8, device="cuda")

    def run() -> Tensor:
        return integrate(lambda z, tau: torch.tanh(z @ weight + tau), z, substeps=4)

    expected, graph = run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.testing.assert_close(found, expected)
