"""Spatial discretisation of the compressible Euler equations: MUSCL reconstruction of primitives and the HLLC flux.

Sources: van Leer, J. Comput. Phys. 32 (1979) (MUSCL, monotonised-central limiter); Toro, Spruce and Speares, Shock Waves 4 (1994)
(HLLC); Davis, SIAM J. Sci. Stat. Comput. 9 (1988) (wave speeds). Written as loops over channels so that a compiler fuses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .boundary import pad
from .equation_of_state import primitive_parts

Gamma = float | Tensor


def limited_slope(below: Tensor, above: Tensor) -> Tensor:
    """Return the monotonised-central slope of two one-sided differences, which keeps face values between those of the neighbours."""
    central = 0.5 * (below + above)
    size = torch.minimum(central.abs(), 2.0 * torch.minimum(below.abs(), above.abs()))
    return torch.where(below * above > 0, torch.copysign(size, central), torch.zeros_like(central))


def face_states(field: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Reconstruct left and right values at the n+1 faces of a field with two ghost cells at both ends of ``axis``."""
    n = field.shape[axis] - 4
    difference = field.narrow(axis, 1, n + 3) - field.narrow(axis, 0, n + 3)
    half = 0.5 * limited_slope(difference.narrow(axis, 0, n + 2), difference.narrow(axis, 1, n + 2))
    inner = field.narrow(axis, 1, n + 2)
    return (inner + half).narrow(axis, 0, n + 1), (inner - half).narrow(axis, 1, n + 1)


def hllc(left: list[Tensor], right: list[Tensor], normal: int, gamma: Gamma) -> list[Tensor]:
    """Return the flux of (rho, momentum..., E) through faces normal to axis ``normal``, from primitives (rho, velocity..., p)."""
    rho_l, u_l, p_l = left[0], left[1 + normal], left[-1]
    rho_r, u_r, p_r = right[0], right[1 + normal], right[-1]
    c_l, c_r = torch.sqrt(gamma * p_l / rho_l), torch.sqrt(gamma * p_r / rho_r)
    s_l, s_r = torch.minimum(u_l - c_l, u_r - c_r), torch.maximum(u_l + c_l, u_r + c_r)
    mass_l, mass_r = rho_l * (s_l - u_l), rho_r * (s_r - u_r)
    contact = (p_r - p_l + mass_l * u_l - mass_r * u_r) / (mass_l - mass_r)
    from_left = contact >= 0

    rho, p = torch.where(from_left, rho_l, rho_r), torch.where(from_left, p_l, p_r)
    velocity = [torch.where(from_left, a, b) for a, b in zip(left[1:-1], right[1:-1], strict=True)]
    u, s = velocity[normal], torch.where(from_left, s_l, s_r)
    energy = p / (gamma - 1.0) + 0.5 * rho * sum(v * v for v in velocity)
    # Only the part of the fan on this side of the face counts: beyond a supersonic wave the jump term vanishes.
    reach = torch.where(from_left, s_l.clamp(max=0.0), s_r.clamp(min=0.0))
    star = rho * (s - u) / (s - contact)

    flux = [rho * u + reach * (star - rho)]
    for axis, v in enumerate(velocity):
        pushed, kept = (p, contact) if axis == normal else (0.0, v)
        flux.append(rho * u * v + pushed + reach * (star * kept - rho * v))
    star_energy = star * (energy / rho + (contact - u) * (contact + p / (rho * (s - u))))
    flux.append((energy + p) * u + reach * (star_energy - energy))
    return flux


def rate_of_change(u: Tensor, gamma: Gamma, cells_per_length: tuple[float, ...], boundary: tuple[str, ...]) -> Tensor:
    """Return dU/dt ``[N, d+2, *S]`` of conserved states from face fluxes; it sums to zero on a periodic domain."""
    rho, velocity, pressure = primitive_parts(u, gamma)
    fields = [rho, *velocity, pressure]
    total: list[Tensor] | None = None
    for axis, kind in enumerate(boundary):
        dim = axis + 1
        faces = [face_states(pad(f, dim, kind, odd=i == 1 + axis), dim) for i, f in enumerate(fields)]
        flux = hllc([f[0] for f in faces], [f[1] for f in faces], axis, gamma)
        n = u.shape[axis + 2]
        change = [cells_per_length[axis] * (f.narrow(dim, 0, n) - f.narrow(dim, 1, n)) for f in flux]
        total = change if total is None else [a + b for a, b in zip(total, change, strict=True)]
    assert total is not None
    return torch.stack(total, dim=1)


def fastest_rate(u: Tensor, gamma: Gamma, cells_per_length: tuple[float, ...]) -> Tensor:
    """Return max over cells of sum_d (|u_d| + c) / dx_d per problem, ``[N]``; its inverse is the unsplit stability limit."""
    rho, velocity, pressure = primitive_parts(u, gamma)
    sound = torch.sqrt(gamma * pressure / rho)
    rate = sum((v.abs() + sound) * per for v, per in zip(velocity, cells_per_length, strict=True))
    assert torch.is_tensor(rate)
    return rate.flatten(1).amax(1)


def ssp_rk2_step(
    u: Tensor, remaining: Tensor, cfl: float, gamma: Gamma, cells_per_length: tuple[float, ...], boundary: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Take one strong-stability-preserving Runge-Kutta step with a separate dt <= ``remaining [N]`` per problem; return (u, dt).

    A problem with no time remaining takes dt = 0 and is returned bit for bit.
    """
    dt = torch.minimum(cfl / fastest_rate(u, gamma, cells_per_length), remaining)
    step = dt.reshape(-1, *[1] * (u.ndim - 1))
    first = u + step * rate_of_change(u, gamma, cells_per_length, boundary)
    second = first + step * rate_of_change(first, gamma, cells_per_length, boundary)
    return 0.5 * u + 0.5 * second, dt
