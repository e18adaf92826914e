"""The polynomials behind ``ops.normal``: ``python -m bench.fit_normal`` prints the constants of csrc/keyed_loop.cpp.

Each is ``lead + t P(t)`` with the P of least maximal relative error (Remez exchange), rounded to float32; the printed error is that of the
rounded polynomial, evaluated exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]
POINTS = 4001
TERMS = 30  # terms of the power series, all of which converge fast enough for |t| <= pi^2 / 16


def remez(rest: Function, size: Function, degree: int, low: float, high: float) -> np.ndarray:
    """Return the coefficients of P, lowest first, that minimize the largest ``|t (P(t) - rest(t)) / size(t)|`` on [low, high]."""
    t = low + (high - low) * (1 - np.cos(np.linspace(0, np.pi, POINTS))) / 2
    t[t == 0] = 1e-12  # any P is exact at t = 0, where the weight would vanish
    wanted, weight, powers = rest(t), t / size(t), np.vander(t, degree + 1, increasing=True)
    chosen = np.round(np.linspace(0, POINTS - 1, degree + 4)[1:-1]).astype(int)
    while True:
        signs = (-1.0) ** np.arange(degree + 2)
        *found, _ = np.linalg.solve(np.column_stack([powers[chosen] * weight[chosen, None], signs]), (wanted * weight)[chosen])
        error = (powers @ np.array(found) - wanted) * weight
        arcs = np.split(np.arange(POINTS), np.flatnonzero(np.diff(np.sign(error))) + 1)
        extrema = [arc[np.abs(error[arc]).argmax()] for arc in arcs]
        while len(extrema) > degree + 2:
            extrema.pop(0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1)
        if len(extrema) < degree + 2 or np.array_equal(extrema, chosen):
            return np.array(found)
        chosen = np.array(extrema)


def series(coefficient: Callable[[int], float], first: int) -> Function:
    """Return ``sum over k >= first of coefficient(k) t^(k - first)``."""
    return lambda t: sum(coefficient(k) * t ** (k - first) for k in range(first, TERMS + first))


def log_rest(t: np.ndarray) -> np.ndarray:
    """Return ``(-2 ln(1 + t) / t + 2) / t``, by its power series near 0, where the formula cancels."""
    near = np.abs(t) < 0.05
    safe = np.where(near, -0.25, t)
    return np.where(near, series(lambda k: -2 * (-1) ** k / (k + 1), 1)(np.where(near, t, 0)), (-2 * np.log1p(safe) / safe + 2) / safe)


eighth = (math.pi / 4) ** 2
FITS: dict[str, tuple[str, float, Function, int, float, float]] = {
    "Log": ("-2 ln(1 + t) / t", -2.0, log_rest, 7, -0.5, 0.0),
    "Sin": ("sin(sqrt t) / sqrt t", 1.0, series(lambda k: (-1) ** k / math.factorial(2 * k + 1), 1), 2, 0.0, eighth),
    "Cos": ("cos(sqrt t)", 1.0, series(lambda k: (-1) ** k / math.factorial(2 * k), 1), 2, 0.0, eighth),
}


def main() -> None:
    for name, (meaning, lead, rest, degree, low, high) in FITS.items():

        def whole(t: np.ndarray, lead: float = lead, rest: Function = rest) -> np.ndarray:
            return lead + t * rest(t)

        found = remez(rest, whole, degree, low, high).astype(np.float32)
        t = np.linspace(low, high, 100_001)
        error = np.abs((lead + t * np.polynomial.polynomial.polyval(t, found.astype(np.float64))) / whole(t) - 1).max()
        print(f"k{name}: {meaning} = {lead} + t P(t), relative error {error:.1e}")
        print("   ", ", ".join(f"{c:.9g}" for c in found))


if __name__ == "__main__":
    main()
