"""The classical solvers of the data's physics, on the model's grid and on coarser and finer ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ttcfast.data import TrajectorySet
from ttcfast.data.convert import check_convertible, to_spec
from ttcfast.data.generate import block_average
from ttcfast.physics import EulerSolver, VorticitySolver
from ttcfast.physics.boundary import pad
from ttcfast.physics.finite_volume import fastest_rate, limited_slope, rate_of_change
from ttcfast.physics.navier_stokes import spectral_resampling
from ttcfast.physics.solver import Step, can_compile
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.units import time_step_of
from ttcfast.spec import EulerSpec, StateSpec

COMPILE_ABOVE = 2e7
"""Value updates above which a gas solver is compiled, in half a minute, so that its seconds are those of a user of the solver."""


class GridSolver:
    """Advances states of one physics by the time between two frames of the data, on a grid that may be another than the states'.

    Args:
        shape: Cells of the states per axis.
        time_step: Time between two frames.
    """

    compiled = False
    """Whether the solver is compiled, which a first call on every grid waits for."""

    def __init__(self, shape: Sequence[int], time_step: float) -> None:
        self.shape, self.time_step = tuple(shape), time_step

    def name(self, cells: int) -> str:
        """Return the method's name on a grid of so many cells along the first axis: ``"solver 32x32"``."""
        return "solver " + "x".join(str(n * cells // self.shape[0]) for n in self.shape)

    def check(self, cells: Sequence[int]) -> None:
        """Raise ``ArgumentError`` unless the solver takes grids of so many cells along the first axis."""
        raise NotImplementedError

    def advance(self, x: Tensor, times: Tensor, cells: int, problem_ids: Tensor | None = None) -> Tensor:
        """Advance states ``[N, C, *S]`` from time 0 on a grid and return them at ``times`` on their own, ``[N, T, C, *S]``."""
        raise NotImplementedError

    def step(self, x: Tensor, problem_ids: Tensor | None = None) -> Tensor:
        """Return the states a frame after ``x [N, C, *S]``, solved on their own grid; ids tell which problems they are of."""
        return self.advance(x, torch.tensor([self.time_step]), self.shape[0], problem_ids)[:, 0]

    def rollout(self, x0: Tensor, steps: int, cells: int) -> Tensor:
        """Return frames 0 to ``steps`` of every problem, ``[N, steps+1, C, *S]``, solved on a grid of so many cells."""
        return self.advance(x0, torch.arange(steps + 1) * self.time_step, cells)


class StepSolver(GridSolver):
    """A step of one's own: any function from states ``[N, C, *S]`` to those a frame later, on the same grid.

    A function that takes ``problem_ids [N]`` is told which problems the states are of.
    """

    def __init__(self, step: Callable[..., Tensor], shape: Sequence[int]) -> None:
        super().__init__(shape, 1.0)  # whatever the time between two frames is
        self._step, self._located = step, takes_problems(step)

    def check(self, cells: Sequence[int]) -> None:
        if other := [n for n in cells if n != self.shape[0]]:
            raise ArgumentError(f"eval.solvers is {list(cells)}; a step of one's own has the model's grid, not one of {other[0]} cells")

    def step(self, x: Tensor, problem_ids: Tensor | None = None) -> Tensor:
        return self._step(x, problem_ids=problem_ids) if self._located else self._step(x)

    def rollout(self, x0: Tensor, steps: int, cells: int) -> Tensor:
        frames, problems = [x0], torch.arange(len(x0), device=x0.device)
        for _ in range(steps):
            frames.append(self.step(frames[-1], problems))
        return torch.stack(frames, 1)


class EulerGrids(GridSolver):
    """The scheme of ``ttcfast generate`` for a gas, with the settings stored in the data.

    A coarser grid starts from block averages. Back on a finer grid every cell is filled by the scheme's own limited slopes, which keep its
    totals; a finer grid starts so, too, as a user of the solver would, who has no other data.

    Args:
        spec: Layout of the states; gamma may differ between problems.
        shape, time_step: As for ``GridSolver``.
        parameters: Settings that ``ttcfast generate`` stored: CFL number, precision, boundary. Other data are solved by the solver's
            defaults, with the boundary of the layout.
        spacing: Cell size along each axis.
        work: Frames times problems to be solved, by which it is decided whether to compile.

    Raises:
        ValueError: The states cannot be written as density, momentum and energy and read from them.
    """

    def __init__(
        self,
        spec: EulerSpec,
        shape: Sequence[int],
        time_step: float,
        parameters: Mapping[str, Any],
        *,
        spacing: Sequence[float],
        work: int = 0,
    ) -> None:
        super().__init__(shape, time_step)
        d = spec.ndim
        changes = {"density": 0, "momentum": tuple(range(1, d + 1)), "energy": d + 1, "pressure": None, "extra": ()}
        self.spec = spec
        self.own = spec.replace(**changes, variables="conserved", boundary_mask=None, boundary_value=None)
        check_convertible(spec, self.own)
        check_convertible(self.own, spec)
        walls = "reflecting" if spec.closed else "outflow"
        given = parameters.get("boundary")
        self.boundary = (given,) * d if given else tuple("periodic" if p else walls for p in spec.periodic_axes)
        self.cfl, self.dtype = float(parameters.get("cfl", 0.4)), getattr(torch, str(parameters.get("dtype", "float32")))
        self.extent = tuple(h * n for h, n in zip(spacing, self.shape, strict=True))
        updates = work * (d + 2) * math.prod(self.shape) * time_step * 4 * sum(1 / h for h in spacing) / self.cfl
        self.compiled = updates > COMPILE_ABOVE and can_compile("cpu")

    def check(self, cells: Sequence[int]) -> None:
        for n in cells:
            fine, coarse = max(n, self.shape[0]), min(n, self.shape[0])
            if fine % coarse or any(m * n % self.shape[0] or m * n // self.shape[0] < 4 for m in self.shape):
                raise ArgumentError(
                    f"eval.solvers is {list(cells)}; a grid of {n} cells neither divides the {self.shape[0]} of the data nor is a "
                    "multiple, or has fewer than 4 along an axis"
                )

    def advance(self, x: Tensor, times: Tensor, cells: int, problem_ids: Tensor | None = None) -> Tensor:
        spec, own = (layout.of_problems(problem_ids) for layout in (self.spec, self.own))
        solver = _AnyGrid(own, self.boundary, self.cfl, self.dtype, extent=self.extent, compile=self.compiled)
        start = self._resampled(to_spec(x, spec, own).unsqueeze(1), cells)[:, 0]
        found = self._resampled(solver.rollout(start, times), self.shape[0])
        return to_spec(found.to(x.dtype), own, spec)

    def _resampled(self, u: Tensor, cells: int) -> Tensor:
        """Bring ``[N, T, C, *S]`` to a grid of so many cells along the first axis, with the same totals."""
        n = u.shape[3]
        if cells < n:
            return _block_average(u, n // cells)
        for axis, kind in enumerate(self.boundary) if cells > n else ():
            u = _filled(u, 3 + axis, cells // n, kind, normal=1 + axis)
        return u


class KolmogorovGrids(GridSolver):
    """The spectral solver of ``ttcfast generate system=kolmogorov``; a finer grid starts from the waves that the frame holds.

    Args:
        shape, time_step: As for ``GridSolver``.
        parameters: Settings that the command stored with the data.
    """

    def __init__(self, shape: Sequence[int], time_step: float, parameters: Mapping[str, Any]) -> None:
        super().__init__(shape, time_step)
        self.flow = {name: value for name, value in parameters["kolmogorov"].items() if name != "spin_up"}
        self.solver = VorticitySolver(**self.flow, cfl=parameters["cfl"])

    def check(self, cells: Sequence[int]) -> None:
        least = max(8, 2 * self.flow["wave_number"] + 1)
        if wrong := [n for n in cells if n % 2 or n < least]:
            raise ArgumentError(f"eval.solvers is {list(cells)}; {wrong[0]} is no even number of at least {least} cells")

    def advance(self, x: Tensor, times: Tensor, cells: int, problem_ids: Tensor | None = None) -> Tensor:
        return spectral_resampling(self.solver.rollout(spectral_resampling(x, cells), times), self.shape[0]).to(x.dtype)


def takes_problems(step: Callable[..., Any]) -> bool:
    """Whether a function takes ``problem_ids``."""
    try:
        return "problem_ids" in inspect.signature(step).parameters
    except (TypeError, ValueError):  # written in C
        return False


def solver_of(source: TrajectorySet, spec: StateSpec, work: int) -> GridSolver:
    """Return the solver of the physics of trajectories.

    Args:
        source: The trajectories.
        spec: Layout in which they are read, with the gamma of every problem.
        work: Number of frames to be solved, over all problems.

    Raises:
        ArgumentError: There is none here for this physics or layout, or the files are of flows with other parameters.
    """
    stored, dt = [file.parameters for file in source.files], time_step_of(source.times)
    assert dt is not None  # a file holds two frames or more
    if isinstance(spec, EulerSpec):
        cfl = min((p for p in stored), key=lambda p: float(p.get("cfl", 0.4)))
        try:
            return EulerGrids(spec, source.shape, dt, cfl, spacing=source.files[0].spacing, work=work)
        except ValueError as error:
            raise ArgumentError(f"the solver for a gas takes density, momentum along every axis and energy: {error}") from error
    systems = [parameters.get("system") for parameters in stored]
    if any(system != "kolmogorov" for system in systems) or tuple(source.shape) != (source.shape[0],) * 2:
        raise ArgumentError("there is a solver for a gas and for Kolmogorov flow here, and the data are of another physics")
    flows = [{**parameters["kolmogorov"], "spin_up": None} for parameters in stored]
    if any(flow != flows[0] for flow in flows):
        raise ArgumentError("the data files are of flows with other parameters; run each by itself")
    return KolmogorovGrids(source.shape, dt, stored[0])


class _AnyGrid(EulerSolver):
    """Compiled once for grids of any fineness, which the solver that makes data is not, since one grid is all it needs."""

    def _stepper(self, u: Tensor, cells_per_length: tuple[float, ...], end: float) -> Step:
        return _compiled_step if self.compile else super()._stepper(u, cells_per_length, end)


def _compiled_step(
    u: Tensor, remaining: Tensor, cfl: float, gamma: float | Tensor, cells_per_length: tuple[float, ...], boundary: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """``ssp_rk2_step`` with its two parts compiled, in half the time that the whole takes."""
    rate, fastest = _compiled_parts()
    dt = torch.minimum(cfl / fastest(u, gamma, cells_per_length), remaining)
    step = dt.reshape(-1, *[1] * (u.ndim - 1))
    first = u + step * rate(u, gamma, cells_per_length, boundary)
    second = first + step * rate(first, gamma, cells_per_length, boundary)
    return 0.5 * u + 0.5 * second, dt


@cache
def _compiled_parts() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return torch.compile(rate_of_change, dynamic=True), torch.compile(fastest_rate, dynamic=True)


def _block_average(u: Tensor, factor: int) -> Tensor:
    """Average blocks of ``factor`` cells along every space axis of ``[N, T, C, *S]``."""
    if u.ndim == 5:
        return block_average(u, factor)
    for axis in range(3, u.ndim):
        u = u.unflatten(axis, (-1, factor)).double().mean(axis + 1).to(u.dtype)
    return u


def _filled(u: Tensor, axis: int, factor: int, kind: str, *, normal: int) -> Tensor:
    """Divide every cell of ``[N, T, C, *S]`` into ``factor`` along an axis, along its limited slope, which keeps its mean."""
    n, parts = u.shape[axis], []
    for channel, field in enumerate(u.unbind(2)):
        wide = pad(field, axis - 1, kind, odd=channel == normal, width=1)
        difference = wide.diff(dim=axis - 1)
        parts.append(limited_slope(difference.narrow(axis - 1, 0, n), difference.narrow(axis - 1, 1, n)))
    places = (torch.arange(factor, device=u.device, dtype=u.dtype) - (factor - 1) / 2) / factor
    slope = torch.stack(parts, 2).unsqueeze(axis + 1)
    return (u.unsqueeze(axis + 1) + slope * places.reshape(-1, *[1] * (u.ndim - 1 - axis))).flatten(axis, axis + 1)
