"""How far two states are from one step of the equations: the residual of Simpson's rule, and the rates of change that it integrates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .boundary import pad
from .equation_of_state import conserved, primitive_parts
from .finite_volume import Gamma, rate_of_change


def simpson_residual(x: Tensor, c: Tensor, start: Tensor, end: Tensor, rate: Callable[[Tensor], Tensor], dt: float) -> Tensor:
    """Return ``c - x - dt/6 (R(x) + 4 R(m) + R(c))`` of two states ``dt`` apart.

    The midpoint ``m = (x + c)/2 + dt/8 (R(x) - R(c))`` is that of the cubic with these values and rates, so that the residual of an exact
    step falls with the fifth power of ``dt``.

    Args:
        x, c: State and candidate, in any representation that ``rate`` takes, such as Fourier coefficients.
        start, end: ``R(x)`` and ``R(c)``.
        rate: R, the rate of change of a state.
        dt: Time between the two.

    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, section II.7 (Lobatto collocation).
    """
    middle = (x + c) / 2 + dt / 8 * (start - end)
    return c - x - dt / 6 * (start + 4 * rate(middle) + end)


def central_rate(u: Tensor, primitive: tuple[Tensor, list[Tensor], Tensor], cell: Sequence[float], boundary: Sequence[str]) -> Tensor:
    """Return ``-div F(u)`` of the Euler equations by fourth-order central differences of the flux, ``[N, d+2, *S]``.

    Args:
        u: Density, momentum and energy, ``[N, d+2, *S]``.
        primitive: Density, velocity components and pressure of ``u``, as ``primitive_parts`` returns them.
        cell: Width of a cell along each axis.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"`` along each axis.
    """
    _, velocity, pressure = primitive
    momentum, work = [u[:, 1 + i] for i in range(len(velocity))], u[:, -1] + pressure
    parts = []
    for axis, (v, width, kind) in enumerate(zip(velocity, cell, boundary, strict=True)):
        pushed = [m * v + pressure if i == axis else m * v for i, m in enumerate(momentum)]
        flux = torch.stack([momentum[axis], *pushed, work * v], 1)
        parts.append(_difference(flux, axis, kind) / width)
    return -functools.reduce(operator.add, parts)


def _difference(flux: Tensor, axis: int, kind: str) -> Tensor:
    """Fourth-order central difference of a flux ``[N, d+2, *S]`` over one cell width."""
    n, dim = flux.shape[axis + 2], axis + 2
    if kind == "reflecting":  # all but the normal momentum's flux change sign in a mirror
        components = flux.split(1, 1)
        f = torch.cat([pad(part, dim, kind, odd=i != 1 + axis) for i, part in enumerate(components)], 1)
    else:
        f = pad(flux, dim, kind, odd=False)
    a, b, d, e = (f.narrow(dim, i, n) for i in (0, 1, 3, 4))
    return (8 * (d - b) - (e - a)) / 12


def finite_volume_rate(u: Tensor, gamma: Gamma, cell: Sequence[float], boundary: Sequence[str], least: tuple[Tensor, Tensor]) -> Tensor:
    """Return the rate of the solver's scheme, ``[N, d+2, *S]``, with density and pressure of at least ``least``.

    Arguments are as in ``central_rate``; ``gamma`` and ``least`` broadcast against ``[N, *S]``.
    """
    density, velocity, pressure = primitive_parts(u, gamma, least[0])
    safe = conserved(density, velocity, pressure.clamp_min(least[1]), gamma)
    return rate_of_change(safe, gamma, tuple(1 / width for width in cell), tuple(boundary))
