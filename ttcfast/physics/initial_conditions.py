"""Named initial conditions for the compressible Euler equations, in the style of PDEGym.

Every function is ``f(n, grid, *, seed, first=0, gamma=1.4, **ranges) -> conserved [n, C, *S]`` in float64 on the unit square (or
cube), sampled at cell centres. Problem ``i`` depends on ``(seed, first + i)`` and the ranges alone, so a set may be made in any pieces.
Default ranges follow the appendix of Poseidon (Herde et al., 2024, arXiv:2405.19101) unless a docstring states otherwise. Why the data are
our own: ``docs/design/decisions.md ("Simulators and data")``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .equation_of_state import conserved

Range = tuple[float, float]
Array = np.ndarray
Fields = tuple[Array, list[Array], Array]  # density, velocity components, pressure
Bend = Callable[[np.random.Generator, Array, Array], tuple[Array, Array]]
Draw = Callable[..., Fields]  # of a random generator and the coordinates of the cells


def riemann4(
    n: int,
    grid: Sequence[int],
    *,
    seed: int,
    first: int = 0,
    gamma: float = 1.4,
    density: Range = (0.1, 1.0),
    velocity: Range = (-1.0, 1.0),
    pressure: Range = (0.1, 1.0),
) -> Tensor:
    """Four constant quadrants with uniformly drawn states; on a periodic square every interface appears twice."""
    return _stack("riemann4", n, grid, seed, first, gamma, _quadrants(density, velocity, pressure, lambda rng, x, y: (x, y)), ndim=2)


def riemann_curved(
    n: int,
    grid: Sequence[int],
    *,
    seed: int,
    first: int = 0,
    gamma: float = 1.4,
    density: Range = (0.1, 1.0),
    velocity: Range = (-1.0, 1.0),
    pressure: Range = (0.1, 1.0),
    amplitude: float = 0.05,
    modes: int = 2,
) -> Tensor:
    """Four constant states on quadrants with borders bent by sum_ij a_ij sin(2 pi (i x + j y + b_ij)), a ~ U[-amplitude, amplitude].

    The appendix gives an amplitude of 0.1 and no number of modes; the defaults of 0.05 and 2 keep the borders from folding.
    """

    def bend(rng: np.random.Generator, x: Array, y: Array) -> tuple[Array, Array]:
        bent = []
        for coordinate in (x, y):
            a, b = rng.uniform(-amplitude, amplitude, (modes, modes)), rng.uniform(0, 1, (modes, modes))
            waves = [
                a[i - 1, j - 1] * np.sin(2 * np.pi * (i * x + j * y + b[i - 1, j - 1]))
                for i in range(1, modes + 1)
                for j in range(1, modes + 1)
            ]
            bent.append(coordinate + sum(waves))
        return bent[0], bent[1]

    return _stack("riemann_curved", n, grid, seed, first, gamma, _quadrants(density, velocity, pressure, bend), ndim=2)


def kelvin_helmholtz(
    n: int, grid: Sequence[int], *, seed: int, first: int = 0, gamma: float = 1.4, amplitude: float = 0.05, modes: int = 10
) -> Tensor:
    """Shear layers: a stream (rho, u, v, p) = (2, -0.5, 0, 2.5) between two of (1, 0.5, 0, 2.5), with perturbed interfaces.

    The appendix does not state the number of modes; the default is 10.
    """

    def draw(rng: np.random.Generator, x: Array, y: Array) -> Fields:
        def ripple() -> Array:
            a, b = rng.uniform(0, 1, modes), rng.uniform(0, 1, modes)
            return amplitude * sum(a[j] * np.cos(2 * np.pi * (j + 1) * (x + b[j])) for j in range(modes)) / a.sum()

        outer = (y < 0.25 + ripple()) | (y > 0.75 + ripple())
        return np.where(outer, 1.0, 2.0), [np.where(outer, 0.5, -0.5), np.zeros_like(x)], np.full_like(x, 2.5)

    return _stack("kelvin_helmholtz", n, grid, seed, first, gamma, draw, ndim=2)


def gauss_vortices(
    n: int,
    grid: Sequence[int],
    *,
    seed: int,
    first: int = 0,
    gamma: float = 1.4,
    blobs: int = 100,
    strength: Range = (-1.0, 1.0),
    width: Range = (0.01, 0.1),
    density: float = 0.1,
    pressure: float = 2.5,
    speed: float = 0.6,
) -> Tensor:
    """Velocity field of Gaussian vortices on the periodic square, at uniform density and pressure.

    The vorticity is inverted spectrally and the velocity scaled to a root mean square of ``speed`` per component (0.58 in the
    released data).
    """

    def draw(rng: np.random.Generator, x: Array, y: Array) -> Fields:
        vorticity = np.zeros_like(x)
        for _ in range(blobs):
            s, w, cx, cy = rng.uniform(*strength), rng.uniform(*width), *rng.uniform(0, 1, 2)
            dx, dy = (x - cx + 0.5) % 1 - 0.5, (y - cy + 0.5) % 1 - 0.5
            vorticity += s * np.exp(-(dx**2 + dy**2) / (2 * w**2))
        u, v = _velocity_of(vorticity)
        scale = speed / np.sqrt((u**2 + v**2).mean() / 2)
        return np.full_like(x, density), [scale * u, scale * v], np.full_like(x, pressure)

    return _stack("gauss_vortices", n, grid, seed, first, gamma, draw, ndim=2)


def richtmyer_meshkov(
    n: int,
    grid: Sequence[int],
    *,
    seed: int,
    first: int = 0,
    gamma: float = 1.4,
    amplitude: float = 0.05,
    modes: int = 10,
    blast: float = 20.0,
) -> Tensor:
    """A blast (p = ``blast`` for r < 0.1, else 1) inside a rippled bubble of density 2 (r < 0.25 + ripple), at rest.

    The appendix does not state the amplitude of the ripple; the default is 0.05, averaged over the modes.
    """

    def draw(rng: np.random.Generator, x: Array, y: Array) -> Fields:
        radius, angle = np.hypot(x - 0.5, y - 0.5), np.arctan2(y - 0.5, x - 0.5)
        a, b = rng.uniform(0, 1, modes), rng.uniform(0, 1, modes)
        border = 0.25 + amplitude * sum(a[j] * np.sin((j + 1) * angle + 2 * np.pi * b[j]) for j in range(modes)) / a.sum()
        rest = np.zeros_like(x)
        return np.where(radius < border, 2.0, 1.0), [rest, rest], np.where(radius < 0.1, blast, 1.0)

    return _stack("richtmyer_meshkov", n, grid, seed, first, gamma, draw, ndim=2)


def isentropic_vortex(
    n: int,
    grid: Sequence[int],
    *,
    seed: int = 0,
    first: int = 0,
    gamma: float = 1.4,
    strength: float = 5.0,
    length: float = 10.0,
    mean_flow: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """A smooth isentropic vortex advected by the mean flow without change of shape, scaled from a box of ``length`` to the unit square.

    It is an exact solution up to a jump of exp(-length**2 / 8) at the border and returns after a time of ``1 / mean_flow``. ``seed`` is
    ignored.
    """

    def draw(rng: np.random.Generator, x: Array, y: Array) -> Fields:
        dx, dy = length * (x - 0.5), length * (y - 0.5)
        bump = strength / (2 * np.pi) * np.exp(0.5 * (1 - dx**2 - dy**2))
        temperature = 1 - (gamma - 1) / (2 * gamma) * bump**2
        return temperature ** (1 / (gamma - 1)), [mean_flow[0] - bump * dy, mean_flow[1] + bump * dx], temperature ** (gamma / (gamma - 1))

    return _stack("isentropic_vortex", n, grid, seed, first, gamma, draw, ndim=2)


def entropy_wave(
    n: int,
    grid: Sequence[int],
    *,
    seed: int = 0,
    first: int = 0,
    gamma: float = 1.4,
    amplitude: float = 0.2,
    velocity: float = 1.0,
    pressure: float = 1.0,
) -> Tensor:
    """Density wave rho = 1 + amplitude sin(2 pi sum of coordinates), advected at constant velocity and pressure; 1 to 3 dimensions."""

    def draw(rng: np.random.Generator, *x: Array) -> Fields:
        rho = 1 + amplitude * np.sin(2 * np.pi * sum(x))
        return rho, [np.full_like(rho, velocity) for _ in x], np.full_like(rho, pressure)

    return _stack("entropy_wave", n, grid, seed, first, gamma, draw)


def sod(n: int, grid: Sequence[int], *, seed: int = 0, first: int = 0, gamma: float = 1.4, interface: float = 0.5) -> Tensor:
    """Sod's shock tube along the first axis: (rho, u, p) = (1, 0, 1) left of ``interface``, (0.125, 0, 0.1) right of it; 1D to 3D."""

    def draw(rng: np.random.Generator, *x: Array) -> Fields:
        left = x[0] < interface
        return np.where(left, 1.0, 0.125), [np.zeros_like(x[0]) for _ in x], np.where(left, 1.0, 0.1)

    return _stack("sod", n, grid, seed, first, gamma, draw)


PRESETS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (riemann4, riemann_curved, kelvin_helmholtz, gauss_vortices, richtmyer_meshkov, isentropic_vortex, entropy_wave, sod)
}


def _quadrants(density: Range, velocity: Range, pressure: Range, bend: Bend) -> Draw:
    """Four constant states with uniformly drawn density, velocity and pressure, on quadrants of the coordinates that ``bend`` returns."""

    def draw(rng: np.random.Generator, x: Array, y: Array) -> Fields:
        rho, u, v, p = (rng.uniform(*r, (2, 2)) for r in (density, velocity, velocity, pressure))
        bx, by = bend(rng, x, y)
        i, j = (np.floor(2 * bx).astype(int) % 2), (np.floor(2 * by).astype(int) % 2)
        return rho[i, j], [u[i, j], v[i, j]], p[i, j]

    return draw


def _stack(name: str, n: int, grid: Sequence[int], seed: int, first: int, gamma: float, draw: Draw, ndim: int | None = None) -> Tensor:
    shape = tuple(int(s) for s in grid)
    if n < 1 or len(shape) not in (1, 2, 3) or (ndim and len(shape) != ndim):
        raise ValueError(f"{name} got n = {n} and grid = {tuple(grid)}; give n >= 1 and {ndim or '1 to 3'} grid sizes")
    axes = [(np.arange(s) + 0.5) / s for s in shape]
    coordinates = np.meshgrid(*axes, indexing="ij")
    states = []
    for i in range(first, first + n):
        # The name enters the stream so that two presets of one seed share no random numbers.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), i])
        rho, velocity, pressure = draw(rng, *coordinates)
        fields = [torch.from_numpy(np.ascontiguousarray(f, dtype=np.float64))[None] for f in (rho, *velocity, pressure)]
        states.append(conserved(fields[0], fields[1:-1], fields[-1], gamma))
    return torch.cat(states)


def _velocity_of(vorticity: Array) -> tuple[Array, Array]:
    """Return the divergence-free periodic velocity of a vorticity field on the unit square: u = psi_y, v = -psi_x, -lap psi = vorticity."""
    kx, ky = np.meshgrid(*(2 * np.pi * np.fft.fftfreq(s, 1 / s) for s in vorticity.shape), indexing="ij")
    square = kx**2 + ky**2
    square[0, 0] = 1.0
    psi = np.fft.fft2(vorticity) / square
    psi[0, 0] = 0.0
    return np.fft.ifft2(1j * ky * psi).real, np.fft.ifft2(-1j * kx * psi).real
