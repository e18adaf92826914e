"""Batched finite-volume solver of the compressible Euler equations, with a separate time step per problem."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ttcfast.runtime.errors import UserError
from ttcfast.spec import EulerSpec

from .boundary import per_axis
from .equation_of_state import gamma_field
from .finite_volume import Gamma, ssp_rk2_step

# Below this many value updates the eager loop is done before the compiler is (40 s of compilation against 70 ns per value and step).
COMPILE_ABOVE = 5e8
MAX_STEPS = 10_000_000
Step = Callable[..., tuple[Tensor, Tensor]]


class SolverError(UserError):
    """Raised when a solution is no longer positive and finite; the message gives the time and the problems."""


class EulerSolver:
    """Solves the compressible Euler equations of an ideal gas by MUSCL (monotonised central), HLLC and SSP-RK2.

    The scheme conserves to round-off on periodic domains (face fluxes telescope). Extra channels are refused, as they are not advected.
    The papers are cited in ``ttcfast/physics/finite_volume.py``.

    Args:
        spec: Layout with ``variables="conserved"``, 1 to 3 space dimensions and one momentum component per dimension; ``gamma`` may
            differ per problem.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"``, or one of them per axis.
        cfl: CFL number in (0, 1), dt = cfl / max_cells sum_d (|u_d| + c) / dx_d; positivity is safe up to 0.5.
        dtype: float32 or float64, the precision of computation and result.
        extent: Length of the domain, or one length per axis.
        compile: Whether to compile the step; None compiles if the work repays the compiler's 40 s and a C++ compiler is available.

    Raises:
        ValueError: The layout is primitive or has other channels, or boundary, cfl or dtype are not supported.
        SolverError: Density or pressure is no longer positive and finite.
    """

    def __init__(
        self,
        spec: EulerSpec,
        boundary: str | Sequence[str] = "periodic",
        cfl: float = 0.4,
        dtype: torch.dtype = torch.float32,
        *,
        extent: float | Sequence[float] = 1.0,
        compile: bool | None = None,
    ) -> None:
        if spec.variables != "conserved":
            raise ValueError("spec has variables='primitive'; the solver takes conserved states: convert with physics.to_conserved")
        if len(spec.momentum) != spec.ndim:
            raise ValueError(
                f"spec has {len(spec.momentum)} momentum channels in {spec.ndim} dimensions; the solver needs one per dimension"
            )
        if spec.extra or spec.pressure is not None:
            raise ValueError("spec has pressure or extra channels; the solver evolves density, momentum and energy alone")
        if not 0 < cfl < 1:
            raise ValueError(f"cfl is {cfl}; give a number in (0, 1), 0.4 is safe")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype}; give torch.float32 or torch.float64")
        self.spec, self.cfl, self.dtype, self.compile = spec, cfl, dtype, compile
        self.boundary = per_axis(boundary, spec.ndim)
        self.extent = (float(extent),) * spec.ndim if isinstance(extent, (int, float)) else tuple(float(e) for e in extent)
        if len(self.extent) != spec.ndim or min(self.extent) <= 0:
            raise ValueError(f"extent is {extent}; give a positive length or {spec.ndim} of them")
        assert spec.energy is not None
        self._order = [spec.density, *spec.momentum, spec.energy]

    @torch.no_grad()
    def rollout(self, u0: Tensor, times: Tensor | Sequence[float]) -> Tensor:
        """Advance conserved states from time 0 and record them at ``times``.

        Args:
            u0: Conserved states ``[N, C, *S]`` at time 0, on any device, with at least 4 cells per axis.
            times: Ascending times ``[T]`` >= 0, in units of extent / velocity.

        Returns:
            ``[N, T, C, *S]`` in ``dtype``, on the device of ``u0``. The result of a problem does not depend on the rest of the batch.
        """
        self.spec.check_state("u0", u0, channel_axis=1)
        if u0.shape[1] != len(self._order):
            raise ValueError(f"u0 has {u0.shape[1]} channels (shape {tuple(u0.shape)}); the solver evolves {len(self._order)}")
        if min(u0.shape[2:]) < 4:
            raise ValueError(f"u0 has shape {tuple(u0.shape)}; every space axis needs at least 4 cells")
        instants = torch.as_tensor(times, dtype=torch.float64, device="cpu").flatten()
        gaps = torch.diff(instants, prepend=torch.zeros(1, dtype=torch.float64))
        if len(instants) == 0 or not bool((gaps >= 0).all()):
            raise ValueError(f"times is {instants.tolist()}; give at least one time, ascending from 0")

        u = u0[:, self._order].to(self.dtype).contiguous()
        self._check(u, 0.0)
        cells_per_length = tuple(n / e for n, e in zip(u.shape[2:], self.extent, strict=True))
        gamma = gamma_field(self.spec.gamma, u)
        out = u.new_empty((u.shape[0], len(instants), *u.shape[1:]))
        advance = self._stepper(u, cells_per_length, float(instants[-1]))
        time = 0.0
        for i, gap in enumerate(gaps.tolist()):
            u = self._advance(advance, u, gap, gamma, cells_per_length, time)
            time += gap
            out[:, i] = u
        return out[:, :, [self._order.index(c) for c in range(len(self._order))]]

    def _advance(self, advance: Step, u: Tensor, gap: float, gamma: Gamma, cells_per_length: tuple[float, ...], start: float) -> Tensor:
        remaining = torch.full((u.shape[0],), gap, dtype=u.dtype, device=u.device)
        # Asking the device "done?" stalls it, so a GPU is asked every few steps; a finished problem takes dt = 0 meanwhile.
        every = 1 if u.device.type == "cpu" else 16
        for step in range(MAX_STEPS):
            if step % every == 0 and not bool((remaining > 0).any()):
                break
            u, dt = advance(u, remaining, self.cfl, gamma, cells_per_length, self.boundary)
            remaining = remaining - dt
            if step % 64 == 0:
                self._check(u, start)
        self._check(u, start + gap)
        return u

    def _check(self, u: Tensor, time: float) -> None:
        pressure_like = u[:, -1] * u[:, 0] - 0.5 * (u[:, 1:-1] ** 2).sum(1)
        good = ((u[:, 0] > 0) & (pressure_like > 0) & torch.isfinite(u).all(1)).flatten(1).all(1)
        if not bool(good.all()):
            bad = [int(i) for i in torch.nonzero(~good).flatten()[:4]]
            remedy = "check the initial condition" if time == 0 else "lower cfl or refine the grid"
            raise SolverError(f"density or pressure is not positive and finite near t = {time:.4g} in problems {bad}: {remedy}")

    def _stepper(self, u: Tensor, cells_per_length: tuple[float, ...], end: float) -> Step:
        compiled = self.compile
        if compiled is None:
            # A sound speed of order 1 is the guess behind the number of steps; only the choice of path depends on it.
            updates = u.numel() * end * 4 * sum(cells_per_length) / self.cfl
            compiled = updates > COMPILE_ABOVE and can_compile(u.device.type)
        return _compiled_step() if compiled else ssp_rk2_step


def can_compile(device: str) -> bool:
    """Return whether torch.compile can run on a device: it needs a C++ compiler on the CPU and Triton on a GPU."""
    return shutil.which("g++") is not None if device == "cpu" else importlib.util.find_spec("triton") is not None


@cache
def _compiled_step() -> Step:
    return torch.compile(ssp_rk2_step, dynamic=False)
