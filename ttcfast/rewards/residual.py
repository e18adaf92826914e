"""Scores candidates by a residual: a function of one's own, or how far a candidate is from solving the equations over the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.physics.boundary import per_axis
from ttcfast.physics.equation_of_state import gamma_field, primitive_parts, to_conserved
from ttcfast.physics.finite_volume import Gamma, fastest_rate
from ttcfast.physics.navier_stokes import LENGTH, VorticitySolver
from ttcfast.physics.step_residual import central_rate, finite_volume_rate, simpson_residual
from ttcfast.runtime.lent import lent
from ttcfast.spec import EulerSpec, StateSpec
from ttcfast.stochastic_sampling.row_axis import over
from ttcfast.transfer import indices

from .ascent import polyak_move
from .scorer import ScoreContext, Scorer

Norm = Literal["absolute", "square"]
_LEAST = 1e-3  # of the state's mean density and pressure, below which those of a candidate are raised before they divide


class _ResidualScorer(Scorer):
    """Minus the size of what ``residual`` returns for a candidate; candidates and residuals that are not finite score -inf."""

    marks_nonfinite = True
    maximum: float | None = 0.0
    norm: Norm = "absolute"

    def residual(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> Tensor:
        """Returns the residual field ``[N, B, ...]`` of candidates ``[N, B, C, *S]`` for states ``[N, C, *S]``."""
        raise NotImplementedError

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        found = self.residual(state, candidates, context)
        if found.ndim > 2:
            field = found.flatten(2).to(torch.promote_types(found.dtype, torch.float32))
            found = (field.abs() if self.norm == "absolute" else field.square()).mean(2)
        finite = candidates.isfinite().flatten(2).all(2) & found.isfinite()
        return torch.where(finite, -found, -torch.inf)


class Residual(_ResidualScorer):
    """Scores by a function of one's own, so that it stands in a ``ScorerList`` beside other rewards.

    Args:
        fn: Function ``fn(x_t, candidates, context)`` of states ``[N, C, *S]``, candidates ``[N, B, C, *S]`` and a ``StepContext`` (None
            outside of a rollout). It returns a field ``[N, B, ...]``, such as a residual per channel and cell, or a penalty ``[N, B]``;
            lower is better. Refinement needs it to be differentiable in the candidates, each by itself; choosing does not.
        maximum: Largest score, which is minus the penalty: 0 for a penalty of at least 0. It sets the length of refinement's steps; None if
            it is not known.
        norm: Whether a field's penalty is its mean ``"square"`` or mean ``"absolute"`` value.
        ndim: Number of space axes of the states.

    Raises:
        TypeError: ``fn`` is no function of three arguments.
        ValueError: The norm is unknown; when scoring, the function returns another shape; when refining, it is not differentiable.
    """

    def __init__(
        self,
        fn: Callable[[Tensor, Tensor, ScoreContext | None], Tensor],
        *,
        maximum: float | None = 0.0,
        norm: Norm = "square",
        ndim: int = 2,
    ) -> None:
        super().__init__()
        one_of("norm", norm, ("square", "absolute"))
        if not callable(fn) or not _takes_three(fn):
            raise TypeError(f"fn is {_name(fn)}; give a function fn(x_t, candidates, context) that returns a field or a penalty")
        self.fn, self.maximum, self.norm, self.ndim = fn, maximum, norm, ndim
        self.__name__ = self._name = _name(fn)

    def residual(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> Tensor:
        """Returns what the function returns, checked: a field ``[N, B, ...]`` or a penalty ``[N, B]``."""
        given = {"x_t": state, "candidates": candidates}
        if context is not None:
            given["context.problem_ids"] = context.problem_ids
        with lent(f"residual {self._name}", given):
            found: Any = self.fn(state, candidates, context)
        n, b = candidates.shape[:2]
        if not isinstance(found, Tensor) or found.shape[:2] != (n, b) or not found.is_floating_point() or found.numel() == 0:
            got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(
                f"residual {self._name} returned {got} for {n} states with {b} candidates; return floating-point values for every "
                f"candidate, a field [{n}, {b}, ...] or a penalty [{n}, {b}]"
            )
        return found

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """See ``Scorer.ascent``."""
        if self.maximum is None:
            return super().ascent(state, candidates, context)  # says what is missing
        state = state.detach()
        try:
            return polyak_move(
                lambda c: self.score_group(state, c, context), candidates, self.units(state), self.maximum, f"residual {self._name}"
            )
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in ("grad", "graph")):
                raise
            raise ValueError(
                f"residual {self._name} is not differentiable in the candidates ({str(error).splitlines()[0]}), so they cannot be moved "
                "along it; use refine_steps=0"
            ) from error


class EulerResidualScorer(_ResidualScorer):
    """Scores by the local residual of the Euler equations over the step, without any training.

    The score is minus the mean over cells and conserved quantities of ``|c - x - dt/6 (R(x) + 4 R(m) + R(c))|`` (see
    ``physics.step_residual``), in units of the state's own step: the root mean square of ``dt R(x)`` of density, momentum and energy. A
    score of -1 is that of a candidate that misses as much as one step. At shocks the residual is large for the truth too, so that it
    ranks candidates of one state and measures no error.

    Args:
        dt: Time between a state and its candidates.
        cell: Width of a cell, or one width per axis.
        spec: Layout of the states; None means ``StateSpec.euler2d()``. A gamma per problem is selected by the context's problem ids.
            Primitive variables are converted.
        form: How R is computed: ``"simpson"`` by fourth-order central differences, ``"finite_volume"`` by the fluxes of ``EulerSolver``
            (MUSCL, HLLC), which takes three times as long.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"``, or one of them per axis; None follows ``spec``, whose axes that are
            not periodic are walls if it is closed and open otherwise.

    Raises:
        ValueError: The time or a width is not positive, the form or boundary is unknown, or ``spec`` is no gas with one momentum per axis.

    Source: docs/design/decisions.md ("Declared physics").
    """

    scores_projected = True  # what a projection removes is part of the residual

    def __init__(
        self,
        dt: float,
        cell: float | Sequence[float],
        *,
        spec: StateSpec | None = None,
        form: Literal["simpson", "finite_volume"] = "simpson",
        boundary: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        one_of("form", form, ("simpson", "finite_volume"))
        spec = StateSpec.euler2d() if spec is None else spec
        if not isinstance(spec, EulerSpec) or len(spec.momentum) != spec.ndim:
            raise ValueError(
                "spec declares no gas with one momentum per axis; give an EulerSpec, or score other physics by VorticityResidual or "
                "Residual(fn)"
            )
        if boundary is None:
            boundary = ["periodic" if wraps else "reflecting" if spec.closed else "outflow" for wraps in spec.periodic_axes]
        self.spec, self.ndim, self.form = spec, spec.ndim, form
        self.dt, self.cell = _positive("dt", dt), _widths(cell, spec.ndim)
        self.boundary = per_axis(boundary, spec.ndim)

    @property
    def timeless(self) -> bool:
        return type(self) is EulerResidualScorer

    def residual(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> Tensor:
        """Returns the residual of density, momentum and energy in units of the state's step, ``[N, B, d+2, *S]``."""
        n, b = candidates.shape[:2]
        gamma = self._gamma(state, context)
        x = self._conserved(state, gamma)
        least = self._least(x, gamma)
        start = self._rate(x, gamma, least)
        unit = self._unit(x, start)
        several = gamma.repeat_interleave(b, 0) if torch.is_tensor(gamma) and gamma.ndim else gamma
        c = self._conserved(candidates.flatten(0, 1), several)
        x, start = x.repeat_interleave(b, 0), start.repeat_interleave(b, 0)
        floors = (least[0].repeat_interleave(b, 0), least[1].repeat_interleave(b, 0))
        end = self._rate(c, several, floors)
        found = simpson_residual(x, c, start, end, lambda m: self._rate(m, several, floors), self.dt)
        relative: Tensor = found.unflatten(0, (n, b)) / unit.unsqueeze(1)
        return relative

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """Returns the spread that rounding of the candidates alone can cause, ``[N]``; see ``_rounding``."""
        gamma = self._gamma(state, context)
        x = self._conserved(state, gamma).double()
        least = self._least(x, gamma)
        density, velocity, pressure = primitive_parts(x, gamma_field(gamma, x), least[0])
        safe = torch.stack([density, *velocity, pressure.clamp_min(least[1])], 1)
        unit = self._unit(x, self._rate(x, gamma, least))
        fastest = fastest_rate(to_conserved(safe, gamma), gamma_field(gamma, x), tuple(1 / width for width in self.cell))
        return _rounding((x.abs() / unit).flatten(1).mean(1), self.dt * fastest, state.dtype)

    def _rate(self, u: Tensor, gamma: float | Tensor, least: tuple[Tensor, Tensor]) -> Tensor:
        field: Gamma = gamma_field(gamma, u)
        if self.form == "finite_volume":
            return finite_volume_rate(u, field, self.cell, self.boundary, least)
        return central_rate(u, primitive_parts(u, field, least[0]), self.cell, self.boundary)

    def _least(self, x: Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Least density and pressure of candidates, each ``[N, 1, ...]``."""
        density, _, pressure = primitive_parts(x, gamma_field(gamma, x))
        mean = torch.stack([density, pressure]).flatten(2).mean(2).clamp_min(torch.finfo(x.dtype).tiny)
        least = _LEAST * over(mean, torch.stack([density, pressure]))
        return least[0], least[1]

    def _unit(self, x: Tensor, start: Tensor) -> Tensor:
        """The step's size ``[N, d+2, 1, ...]`` of density, momentum (one size for all components) and energy.

        What hardly moves relative to its natural size (rho, sqrt(rho E), E) counts by a thousandth of what moves most.
        """
        size = x.square().flatten(2).mean(2)  # [N, d + 2]
        natural = torch.stack([size[:, 0].sqrt(), (size[:, 0] * size[:, -1]).sqrt().sqrt(), size[:, -1].sqrt()], 1)
        step = (self.dt * start).square().flatten(2).mean(2)
        moved = torch.stack([step[:, 0], step[:, 1:-1].mean(1), step[:, -1]], 1).sqrt() / natural
        least = (1e-3 * moved.amax(1, keepdim=True)).clamp_min(torch.finfo(x.dtype).eps)
        unit = natural * torch.maximum(moved, least)
        return over(torch.cat([unit[:, :1], unit[:, 1:2].expand(-1, self.ndim), unit[:, 2:]], 1), x)

    def _gamma(self, state: Tensor, context: ScoreContext | None) -> float | Tensor:
        spec = self.spec.to(state.device)
        spec = spec if context is None else spec.of_problems(context.problem_ids)
        return spec.gamma.to(state) if torch.is_tensor(spec.gamma) else float(spec.gamma)

    def _conserved(self, u: Tensor, gamma: float | Tensor) -> Tensor:
        """Density, momentum and energy ``[M, d+2, *S]`` of states ``[M, C, *S]``."""
        spec = self.spec
        self.spec.check_state("states", u, channel_axis=1)
        if spec.variables == "primitive":
            assert spec.pressure is not None
            return to_conserved(u[:, indices((spec.density, *spec.momentum, spec.pressure), u.device)], gamma)
        assert spec.energy is not None
        return u[:, indices((spec.density, *spec.momentum, spec.energy), u.device)]


class VorticityResidual(_ResidualScorer):
    """Scores by the residual of vorticity transport over the step, for incompressible flow on a periodic square.

    The equation is that of ``physics.VorticitySolver``, ``w_t + u . grad w = viscosity laplacian(w) - drag w + forcing``, with spectral
    derivatives; the residual is Simpson's, as in ``EulerResidualScorer``, in units of the root mean square of the state's own step
    ``dt R(x)``. Where the grid does not hold all scales of the flow, the truth has a residual too.

    Args:
        dt: Time between a state and its candidates.
        viscosity: Kinematic viscosity, above 0.
        drag: Linear friction, at least 0.
        wave_number, amplitude: Kolmogorov's force ``amplitude sin(2 pi wave_number y / length)`` along x; 0 for none.
        length: Length of the square's sides; x is the first space axis.
        channel: Channel of the vorticity.

    Raises:
        ValueError: A parameter is out of range; when scoring, the grid is not square with an even number of at least 8 cells per axis.

    Source: docs/design/decisions.md ("Declared physics").
    """

    scores_projected = True

    def __init__(
        self,
        dt: float,
        *,
        viscosity: float,
        drag: float = 0.0,
        wave_number: int = 0,
        amplitude: float = 0.0,
        length: float = LENGTH,
        channel: int = 0,
    ) -> None:
        super().__init__()
        per = LENGTH / _positive("length", length)  # lengths in units in which the sides are 2 pi, as the solver's
        self.dt, self.channel = _positive("dt", dt), channel
        self.solver = VorticitySolver(viscosity=viscosity * per**2, drag=drag, wave_number=wave_number, amplitude=amplitude * per)

    @property
    def timeless(self) -> bool:
        return type(self) is VorticityResidual

    def residual(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> Tensor:
        """Returns the residual in units of the state's step, ``[N, B, 1, n, n]``."""
        n, b = candidates.shape[:2]
        x = self._vorticity(state)
        start = self.solver.rate(x)
        unit = self._unit(x, start)
        c = self._vorticity(candidates.flatten(0, 1))
        x, start = x.repeat_interleave(b, 0), start.repeat_interleave(b, 0)
        found = simpson_residual(x, c, start, self.solver.rate(c), self.solver.rate, self.dt)
        relative: Tensor = found.unflatten(0, (n, b)) / unit.unsqueeze(1)
        return relative

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """Returns the spread that rounding of the candidates alone can cause, ``[N]``; see ``_rounding``."""
        x = self._vorticity(state).double()
        unit = self._unit(x, self.solver.rate(x))
        return _rounding((x.abs() / unit).flatten(1).mean(1), self.dt * self.solver.fastest_rate(x), state.dtype)

    def _unit(self, x: Tensor, start: Tensor) -> Tensor:
        step, size = ((v * v).flatten(1).mean(1).sqrt() for v in (self.dt * start, x))
        return over(torch.maximum(step, torch.finfo(x.dtype).eps * size).clamp_min(torch.finfo(x.dtype).eps / self.dt), x)

    def _vorticity(self, u: Tensor) -> Tensor:
        cells = u.shape[2:]
        if u.ndim != 4 or cells[0] != cells[1] or cells[0] < 8 or cells[0] % 2 or not 0 <= self.channel < u.shape[1]:
            raise ValueError(
                f"states have shape {tuple(u.shape)}; VorticityResidual needs [C, n, n] with an even n of at least 8 and the vorticity in "
                f"channel {self.channel}"
            )
        return u[:, self.channel : self.channel + 1].to(torch.promote_types(u.dtype, torch.float32))


def _rounding(size: Tensor, courant: Tensor, dtype: torch.dtype) -> Tensor:
    """An upper estimate of how much two scores of one candidate differ by rounding, float64 ``[N]``.

    Two roundings of a cell's value x differ by at most eps |x|. The residual passes this on times ``1 + k/2 + k^2/12``, where k = dt times
    the largest rate of the grid's waves bounds the derivative of dt R: once as c, k/6 as R(c), and ``4 k/6 (1/2 + k/8)`` as R(m).

    Args:
        size: Mean over cells of |x| in units of the residual, ``[N]``.
        courant: k, ``[N]``.
        dtype: Precision of the candidates.
    """
    return torch.finfo(dtype).eps * size * (1 + courant / 2 + courant.square() / 12)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; give a positive number")
    return float(value)


def _widths(cell: float | Sequence[float], ndim: int) -> tuple[float, ...]:
    widths = (cell,) * ndim if isinstance(cell, (int, float)) else tuple(cell)
    if len(widths) != ndim:
        raise ValueError(f"cell is {cell}; give the width of a cell, or one for each of {ndim} axes")
    return tuple(_positive("cell", width) for width in widths)


def _name(fn: Any) -> str:
    name = getattr(fn, "__name__", type(fn).__name__)
    return "fn" if name == "<lambda>" else str(name)


def _takes_three(fn: Callable[..., Any]) -> bool:
    try:
        inspect.signature(fn).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # builtins without a signature
        pass
    return True
