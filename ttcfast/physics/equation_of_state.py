"""The ideal gas: conserved and primitive variables, sound speed, in the channel order rho, (momentum | velocity), (E | p)."""

from __future__ import annotations

import torch
from torch import Tensor


def primitive_parts(u: Tensor, gamma: float | Tensor, least: float | Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return density, velocity components and pressure, each ``[N, *S]``, of conserved states ``[N, d+2, *S]``.

    ``gamma`` broadcasts against ``[N, *S]``. A density below ``least`` is raised to it; with None, a negative one is returned as it is, as
    a negative pressure always is.
    """
    rho, energy = u[:, 0] if least is None else u[:, 0].clamp_min(least), u[:, -1]
    velocity = [u[:, i] / rho for i in range(1, u.shape[1] - 1)]
    kinetic = sum(u[:, 1 + i] * v for i, v in enumerate(velocity))
    return rho, velocity, (gamma - 1.0) * (energy - 0.5 * kinetic)


def conserved(rho: Tensor, velocity: list[Tensor], pressure: Tensor, gamma: float | Tensor) -> Tensor:
    """Return conserved states ``[N, d+2, *S]`` from density, velocity components and pressure, each ``[N, *S]``."""
    energy = pressure / (gamma - 1.0) + 0.5 * rho * sum(v * v for v in velocity)
    return torch.stack([rho, *(rho * v for v in velocity), energy], dim=1)


def to_primitive(u: Tensor, gamma: float | Tensor = 1.4) -> Tensor:
    """Convert conserved states ``[N, d+2, *S]`` to primitive ones (rho, velocity, p); ``gamma`` is a number or ``[N]``."""
    rho, velocity, pressure = primitive_parts(u, gamma_field(gamma, u))
    return torch.stack([rho, *velocity, pressure], dim=1)


def to_conserved(w: Tensor, gamma: float | Tensor = 1.4) -> Tensor:
    """Convert primitive states ``[N, d+2, *S]`` to conserved ones (rho, momentum, E); ``gamma`` is a number or ``[N]``."""
    return conserved(w[:, 0], list(w[:, 1:-1].unbind(1)), w[:, -1], gamma_field(gamma, w))


def gamma_field(gamma: float | Tensor, u: Tensor) -> float | Tensor:
    """Return ``gamma`` shaped to broadcast over ``[N, *S]``, for states ``u [N, C, *S]``."""
    if not torch.is_tensor(gamma) or gamma.ndim == 0:
        return gamma
    if gamma.shape[0] not in (1, u.shape[0]):
        raise ValueError(f"gamma has {gamma.shape[0]} values for {u.shape[0]} problems; give a number or one per problem")
    return gamma.to(u).reshape(-1, *[1] * (u.ndim - 2))
