"""Pseudo-spectral solver of the two-dimensional incompressible Navier-Stokes equations in vorticity form, with Kolmogorov's forcing.

``torch-cfd`` offers such solvers too; it was left out because it brings xarray, seaborn, einops and numpy >= 2.2 along for what is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import whole

from .solver import SolverError

LENGTH = 2 * math.pi
INTERVAL = 0.25  # of time, after which the step is chosen anew


class VorticitySolver:
    """Solves ``w_t + u . grad w = nu laplacian(w) - drag w - amplitude k cos(k y)`` on the periodic square ``[0, 2 pi]^2``.

    The last term is the curl of the force ``amplitude sin(k y)`` along x (Kolmogorov flow). Derivatives are spectral, products are
    de-aliased by the 2/3 rule, linear terms are integrated exactly (integrating factor) and the rest by the classical Runge-Kutta method
    of fourth order. The velocity has mean zero; the mean of w is 0 and stays so.

    Args:
        viscosity: nu, above 0.
        drag: Linear friction, at least 0.
        wave_number: k of the forcing, a whole number; 0 for none.
        amplitude: Amplitude of the force.
        cfl: dt is at most ``cfl * dx / max |u|``, with the largest velocity at the start of every ``INTERVAL``.
        longest: Longest time step.
        dtype: float32 or float64, the precision of computation and result.

    Raises:
        ValueError: A parameter is out of range.

    Source: Canuto, Hussaini, Quarteroni and Zang, "Spectral Methods in Fluid Dynamics", 1988; the flow is that of Kolmogorov, as in
    Chandler and Kerswell, "Invariant recurrent solutions embedded in a turbulent two-dimensional Kolmogorov flow", 2013.
    """

    def __init__(
        self,
        *,
        viscosity: float = 1e-3,
        drag: float = 0.1,
        wave_number: int = 4,
        amplitude: float = 1.0,
        cfl: float = 0.8,
        longest: float = 0.05,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value, least in (("viscosity", viscosity, 0), ("cfl", cfl, 0), ("longest", longest, 0)):
            if not least < value < math.inf:
                raise ValueError(f"{name} is {value}; give a number above 0")
        if not 0 <= drag < math.inf:
            raise ValueError(f"drag is {drag}; give a number of at least 0")
        whole("wave_number", wave_number, 0)
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; give torch.float32 or torch.float64")
        self.viscosity, self.drag, self.wave_number, self.amplitude = viscosity, drag, wave_number, amplitude
        self.cfl, self.longest, self.dtype = cfl, longest, dtype

    @torch.no_grad()
    def rollout(self, w0: Tensor, times: Tensor | Sequence[float]) -> Tensor:
        """Advance vorticity from time 0 and record it at ``times``.

        Args:
            w0: Vorticity ``[N, 1, n, n]`` at time 0, x along the first space axis, with at least 8 cells per axis; its mean is removed.
            times: Ascending times ``[T]`` >= 0.

        Returns:
            ``[N, T, 1, n, n]`` in ``dtype``. But for rounding the result of a problem does not depend on the rest of the batch.

        Raises:
            ValueError: Another shape, a grid too coarse for the forcing, or times that descend.
            SolverError: A solution is no longer finite.
        """
        if w0.ndim != 4 or w0.shape[1] != 1 or w0.shape[2] != w0.shape[3] or w0.shape[2] < 8 or w0.shape[2] % 2:
            raise ValueError(f"w0 has shape {tuple(w0.shape)}; expected vorticity [N, 1, n, n] with an even n of at least 8")
        self._check_forcing(w0.shape[-1])
        instants = torch.as_tensor(times, dtype=torch.float64, device="cpu").flatten()
        gaps = torch.diff(instants, prepend=torch.zeros(1, dtype=torch.float64))
        if len(instants) == 0 or not bool((gaps >= 0).all()):
            raise ValueError(f"times is {instants.tolist()}; give at least one time, ascending from 0")
        solve = _Spectral(self, w0.shape[-1], w0.device, self.dtype)
        w = torch.fft.rfft2(w0[:, 0].to(self.dtype))
        w[:, 0, 0] = 0
        out = w0.new_empty((len(w0), len(instants), 1, *w0.shape[2:]), dtype=self.dtype)
        for i, gap in enumerate(gaps.tolist()):
            w = solve.advance(w, gap)
            out[:, i, 0] = torch.fft.irfft2(w, s=w0.shape[2:])
            if not bool(out[:, i].isfinite().all()):
                bad = (~out[:, i].isfinite().flatten(1).all(1)).nonzero().flatten()[:4].tolist()
                raise SolverError(
                    f"vorticity is not finite near t = {float(instants[i]):.4g} in problems {bad}: lower cfl or refine the grid"
                )
        return out

    def rate(self, w: Tensor) -> Tensor:
        """Return the rate of change of vorticity ``[N, 1, n, n]``, in its dtype and differentiable in it.

        Products are computed on a grid of 3/2 as many cells, so that all waves of the given grid but its shortest are exact.
        """
        n = w.shape[-1]
        self._check_forcing(n)
        solve = _Spectral(self, 2 * math.ceil(3 * n / 4), w.device, w.dtype)
        fine = torch.fft.rfft2(spectral_resampling(w[:, 0], solve.n))
        slope = solve.slope(fine) + solve.linear * fine
        return spectral_resampling(torch.fft.irfft2(slope, s=(solve.n, solve.n)), n).unsqueeze(1)

    def _check_forcing(self, n: int) -> None:
        if self.amplitude and not self.wave_number < n / 2:
            raise ValueError(
                f"wave_number is {self.wave_number}, which a grid of {n} cells does not hold; give more than {2 * self.wave_number}"
            )

    def fastest_rate(self, w: Tensor) -> Tensor:
        """Return a bound of the rate at which the shortest waves of ``[N, 1, n, n]`` are carried and damped, ``[N]``."""
        solve = _Spectral(self, w.shape[-1], w.device, w.dtype)
        u, v, _, _ = solve.fields(torch.fft.rfft2(w[:, 0]))
        return (u.abs() + v.abs()).flatten(1).amax(1) * (solve.n / 2) - solve.linear.amin()


class _Spectral:
    """The operators of one grid; a problem takes time steps of its own."""

    def __init__(self, solver: VorticitySolver, n: int, device: torch.device, dtype: torch.dtype) -> None:
        self.n, self.cfl, self.longest = n, solver.cfl, solver.longest
        options: Any = {"dtype": dtype, "device": device}
        kx = torch.fft.fftfreq(n, 1 / n, **options).unsqueeze(1)
        ky = torch.fft.rfftfreq(n, 1 / n, **options).unsqueeze(0)
        square = kx * kx + ky * ky
        self.linear = -solver.viscosity * square - solver.drag
        inverse = torch.where(square > 0, 1 / square.clamp_min(1), 0.0)
        # u = d psi / dy, v = -d psi / dx with psi = -w / laplacian; then the gradient of w. The highest wave has no derivative.
        dx, dy = (torch.where(k.abs() < n / 2, k, 0.0) for k in (kx, ky))
        self.operators = torch.stack([dy * inverse, -dx * inverse, dx.expand_as(square), dy.expand_as(square)]) * 1j
        self.kept = ((kx.abs() < n / 3) & (ky < n / 3)).to(dtype)
        y = torch.arange(n, **options) * (LENGTH / n)
        k = solver.wave_number
        force = (-solver.amplitude * k * torch.cos(k * y)).expand(n, n)
        self.force = torch.fft.rfft2(force.contiguous())

    def advance(self, w: Tensor, gap: float) -> Tensor:
        parts = math.ceil(gap / INTERVAL)
        for _ in range(parts):
            w = self._advance(w, gap / parts)
        return w

    def _advance(self, w: Tensor, gap: float) -> Tensor:
        u, v, _, _ = self.fields(w)
        fastest = (u * u + v * v).flatten(1).amax(1).sqrt().double()
        dt = (self.cfl * (LENGTH / self.n) / fastest.clamp_min(1e-12)).clamp_max(self.longest)
        counts = (gap / dt).ceil().clamp_min(1).long()  # of each problem, so that a batch changes none of them
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero().flatten()
            own, step = w[rows], gap / count
            half = torch.exp(self.linear * (step / 2))
            for _ in range(count):
                own = self._step(own, step, half)
            w = w.index_copy(0, rows, own)
        return w

    def _step(self, w: Tensor, dt: float, half: Tensor) -> Tensor:
        """One step of Runge-Kutta for ``exp(-L t) w``."""
        k1 = self.slope(w)
        k2 = self.slope(half * (w + (dt / 2) * k1))
        k3 = self.slope(half * w + (dt / 2) * k2)
        k4 = self.slope(half * (half * w + dt * k3))
        return half * (half * (w + (dt / 6) * k1) + (dt / 3) * (k2 + k3)) + (dt / 6) * k4

    def slope(self, w: Tensor) -> Tensor:
        u, v, wx, wy = self.fields(w)
        return self.force - self.kept * torch.fft.rfft2(u * wx + v * wy)

    def fields(self, w: Tensor) -> tuple[Tensor, ...]:
        return torch.fft.irfft2(self.operators.unsqueeze(1) * w, s=(self.n, self.n)).unbind(0)


def random_vorticity(n: int, grid: int, *, seed: int, first: int = 0, peak: float = 4.0, width: float = 2.0, rms: float = 4.0) -> Tensor:
    """Smooth random vorticity to start from, float64 ``[n, 1, grid, grid]``.

    Its spectrum is white noise times ``exp(-(|k| - peak)^2 / (2 width^2))``, without a mean, of root mean square ``rms``. Problem ``i``
    depends on ``(seed, first + i)`` and the other arguments alone.
    """
    kx, ky = np.fft.fftfreq(grid, 1 / grid)[:, None], np.fft.rfftfreq(grid, 1 / grid)[None]
    k = np.sqrt(kx**2 + ky**2)
    envelope = np.exp(-((k - peak) ** 2) / (2 * width**2))
    envelope[0, 0] = 0
    out = np.empty((n, 1, grid, grid))
    for i in range(n):
        noise = np.random.default_rng([seed, first + i, 0x6B6F6C]).standard_normal((grid, grid))
        field = np.fft.irfft2(np.fft.rfft2(noise) * envelope, s=(grid, grid))
        out[i, 0] = field * (rms / np.sqrt((field**2).mean()))
    return torch.from_numpy(out)


def spectral_resampling(x: Tensor, cells: int) -> Tensor:
    """The waves of ``[..., n, n]`` that a grid of ``cells`` x ``cells`` can tell apart, on that grid, which may be coarser or finer.

    Waves of the coarser grid's shortest length are left out, since there the two signs of their wave number fall together.

    Raises:
        ValueError: A number of cells is odd.
    """
    n, half = x.shape[-1], min(cells, x.shape[-1]) // 2
    if cells % 2 or n % 2 or cells < 2:
        raise ValueError(f"cells is {cells} for {n} cells; give even numbers")
    if cells == n:
        return x
    given = torch.fft.rfft2(x)
    taken = given.new_zeros((*x.shape[:-2], cells, cells // 2 + 1))
    taken[..., :half, :half] = given[..., :half, :half]
    taken[..., -half + 1 :, :half] = given[..., -half + 1 :, :half]
    return torch.fft.irfft2(taken, s=(cells, cells)) * (cells / n) ** 2
