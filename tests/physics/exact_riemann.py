"""The exact solution of the one-dimensional Riemann problem of an ideal gas (Toro, Riemann Solvers and Numerical Methods, chapter 4)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq

State = tuple[float, float, float]  # density, velocity, pressure


def star_state(left: State, right: State, gamma: float = 1.4) -> tuple[float, float]:
    """Pressure and velocity between the two waves."""

    def f(p: float, side: State) -> float:
        rho, _, p0 = side
        c = np.sqrt(gamma * p0 / rho)
        if p > p0:
            return (p - p0) * np.sqrt(2 / ((gamma + 1) * rho) / (p + (gamma - 1) / (gamma + 1) * p0))
        return 2 * c / (gamma - 1) * ((p / p0) ** ((gamma - 1) / (2 * gamma)) - 1)

    p = brentq(lambda q: f(q, left) + f(q, right) + right[1] - left[1], 1e-9, 1e3, xtol=1e-14)
    return p, 0.5 * (left[1] + right[1] + f(p, right) - f(p, left))


def sample(left: State, right: State, speed: np.ndarray, gamma: float = 1.4) -> np.ndarray:
    """Density, velocity, pressure ``[3, n]`` at ``speed = x / t``."""
    p_star, u_star = star_state(left, right, gamma)
    out = np.empty((3, speed.size))
    for k, s in enumerate(speed):
        mirrored = s > u_star
        rho, u, p = right if mirrored else left
        sign = -1.0 if mirrored else 1.0
        u, s, u_mid = sign * u, sign * s, sign * u_star
        out[:, k] = _left_wave(rho, u, p, s, p_star, u_mid, gamma)
        out[1, k] *= sign
    return out


def _left_wave(rho: float, u: float, p: float, s: float, p_star: float, u_star: float, g: float) -> State:
    c = np.sqrt(g * p / rho)
    ratio = p_star / p
    if ratio > 1:
        shock = u - c * np.sqrt((g + 1) / (2 * g) * ratio + (g - 1) / (2 * g))
        if s < shock:
            return rho, u, p
        return rho * (ratio + (g - 1) / (g + 1)) / ((g - 1) / (g + 1) * ratio + 1), u_star, p_star
    c_star = c * ratio ** ((g - 1) / (2 * g))
    if s < u - c:
        return rho, u, p
    if s > u_star - c_star:
        return rho * ratio ** (1 / g), u_star, p_star
    factor = 2 / (g + 1) + (g - 1) / ((g + 1) * c) * (u - s)
    return rho * factor ** (2 / (g - 1)), 2 / (g + 1) * (c + (g - 1) / 2 * u + s), p * factor ** (2 * g / (g - 1))
