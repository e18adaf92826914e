"""Computes how far a candidate is from solving the Euler equations over one step, as features of a reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttcfast.core.normalizer import Normalizer
from ttcfast.physics.equation_of_state import primitive_parts
from ttcfast.physics.step_residual import central_rate, simpson_residual
from ttcfast.spec import EulerSpec, StateSpec
from ttcfast.transfer import indices

_LEAST = 1e-3  # lower bound of density and pressure in divisions and logarithms


@dataclass(frozen=True)
class EulerResidual:
    """Features of two states ``dt`` apart, computed from the equations alone; nothing in them is fitted.

    They are the rates of change by ``physics.step_residual.central_rate`` and the residual of a candidate for the state by
    ``simpson_residual``. It vanishes to fourth order in dt where the solution is smooth; at shocks it is large for the truth too, which
    the network has to learn. Unbounded features pass through asinh, in units of ``delta_std``.

    Args:
        dt: Time between the two states.
        cell: Width of a cell along x and y.

    Raises:
        ValueError: The time or a width is not positive.
    """

    dt: float
    cell: tuple[float, float]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", tuple(float(c) for c in self.cell))
        for name, value in (("dt", self.dt), ("cell", min(self.cell))):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; give a positive time or width")

    @classmethod
    def of(cls, value: EulerResidual | Mapping[str, Any] | None) -> EulerResidual | None:
        return value if value is None or isinstance(value, EulerResidual) else cls(**value)

    @staticmethod
    def check(spec: StateSpec | None, normalizer: Normalizer | None) -> None:
        """Raises ``ValueError`` unless the features can be computed: conserved variables of 2-D Euler, one gamma, a normalizer."""
        euler = isinstance(spec, EulerSpec) and spec.variables == "conserved" and spec.ndim == 2 and len(spec.momentum) == 2
        if spec is None or not euler or torch.is_tensor(spec.gamma):
            raise ValueError(
                "residual needs an EulerSpec with conserved variables in two dimensions and one gamma; use residual=None otherwise"
            )
        if normalizer is None:
            raise ValueError("residual is given without a normalizer, whose delta_std is its unit; give one, or residual=None")

    state_channels = 8
    """Number of features of a state: primitive variables and dt R(x)."""
    candidate_channels = 16
    """Number of features of a candidate: change of the primitive variables, dt R(c), and the residual at two scales."""

    def of_state(self, x: Tensor, spec: StateSpec, normalizer: Normalizer, periodic: Sequence[bool]) -> Tensor:
        """Returns features ``[N, 8, X, Y]`` of states ``[N, C, X, Y]``."""
        rate, primitive = self.rate(x, spec, periodic)
        return torch.cat([primitive, torch.asinh(self.dt * rate / _units(normalizer, spec, x))], 1)

    def of_candidates(self, x: Tensor, candidates: Tensor, spec: StateSpec, normalizer: Normalizer, periodic: Sequence[bool]) -> Tensor:
        """Returns features ``[N, B, 16, X, Y]`` of candidates ``[N, B, C, X, Y]`` for states ``[N, C, X, Y]``."""
        n, b = candidates.shape[:2]
        at = _conserved(spec, x.device)
        unit = _units(normalizer, spec, x)
        c = candidates.flatten(0, 1)
        start, before = self.rate(x, spec, periodic)
        start, before, x4 = (v.repeat_interleave(b, 0) if b > 1 else v for v in (start, before, x[:, at]))
        end, after = self.rate(c, spec, periodic)
        change = simpson_residual(x4, c[:, at], start, end, lambda m: self._rate(m, float(spec.gamma), periodic)[0], self.dt)
        residual = change / unit
        parts = [after - before, torch.asinh(self.dt * end / unit), torch.asinh(residual), torch.asinh(4 * residual)]
        return torch.cat(parts, 1).view(n, b, self.candidate_channels, *c.shape[2:])

    def rate(self, u: Tensor, spec: StateSpec, periodic: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Returns R(u) of density, momentum and energy, ``[N, 4, X, Y]``, and the velocity, log p and log rho, ``[N, 4, X, Y]``."""
        return self._rate(u[:, _conserved(spec, u.device)], float(spec.gamma), periodic)

    def _rate(self, u: Tensor, gamma: float, periodic: Sequence[bool]) -> tuple[Tensor, Tensor]:
        density, velocity, pressure = primitive_parts(u, gamma, _LEAST)
        kinds = ["periodic" if wraps else "outflow" for wraps in periodic]
        rate = central_rate(u, (density, velocity, pressure), self.cell, kinds)
        return rate, torch.stack([*velocity, pressure.clamp_min(_LEAST).log(), density.log()], 1)


def _conserved(spec: StateSpec, device: torch.device) -> Tensor:
    """Returns the channels of density, momentum and energy."""
    assert isinstance(spec, EulerSpec) and spec.energy is not None  # as check() requires
    return indices((spec.density, *spec.momentum, spec.energy), device)


def _units(normalizer: Normalizer, spec: StateSpec, like: Tensor) -> Tensor:
    return normalizer.delta_std.to(like)[_conserved(spec, like.device)].view(-1, 1, 1)
