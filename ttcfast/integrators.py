"""Fixed-step integrators of a velocity field over the unit interval: Heun's method (explicit trapezoidal rule) and Euler's.

World models and flow surrogates share them, so that a rollout and the loss that trains it take the same steps.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ttcfast.checks import whole
from ttcfast.ops import heun_correct, heun_predict, transforms

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Integrator(ABC):
    """Integrator that takes K substeps of equal length.

    Args:
        substeps: Number K of substeps, at least 1.

    Raises:
        ValueError: ``substeps`` is below 1.
    """

    substeps: int = 2
    name: ClassVar[str]
    order: ClassVar[int]

    def __post_init__(self) -> None:
        whole("substeps", self.substeps, 1)

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """Number of velocity evaluations per call."""

    @abstractmethod
    def step(self, velocity: Velocity, z: Tensor, tau: float, after: float, dt: float) -> Tensor:
        """Take one substep of length ``dt`` from time ``tau`` to time ``after``."""

    def __call__(self, velocity: Velocity, z: Tensor, *, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Integrate ``dz/dtau = velocity(z, tau)``.

        Args:
            velocity: Called with a state ``[..., D]`` and a time, a Python number; returns the slope in the state's shape and dtype.
            z: State at ``start``, ``[..., D]``, float32 or float64.
            start: Time of ``z``.
            end: Time of the result; a time before ``start`` integrates backwards.

        Returns:
            State at ``end``, shape and dtype of ``z``. Differentiable in ``z`` and in whatever the velocity depends on. Nothing waits for
            the device, so that a CUDA graph can capture the whole loop.

        Raises:
            ValueError: The velocity's shape, dtype or device is not that of the state, or a time is a tensor to be differentiated.
        """
        transforms.constant("start", start)
        transforms.constant("end", end)
        length, count = end - start, self.substeps
        at = [start + length * k / count for k in range(count + 1)]  # not sums of dt, which would overshoot the end by a rounding
        for tau, after in itertools.pairwise(at):
            z = self.step(velocity, z, tau, after, length / count)
        return z

    def times(self) -> list[float]:
        """Return the distinct times of the unit interval at which the velocity is evaluated, ascending."""
        return [k / self.substeps for k in range(self.substeps + (self.order > 1))]


@dataclass(frozen=True)
class Heun(Integrator):
    """Explicit trapezoidal rule, order 2, two evaluations per substep (torchdiffeq's ``heun2``).

    Source: Flow plan, "ODE Integrator Choice and Justification".
    """

    name = "heun"
    order = 2

    @property
    def evaluations(self) -> int:
        return 2 * self.substeps

    def step(self, velocity: Velocity, z: Tensor, tau: float, after: float, dt: float) -> Tensor:
        k1 = velocity(z, tau)
        k2 = velocity(heun_predict(z, k1, dt), after)
        return heun_correct(z, k1, k2, dt)


@dataclass(frozen=True)
class Euler(Integrator):
    """Forward Euler, order 1, one evaluation per substep, the ablation.

    Source: Flow plan, "ODE Integrator Choice and Justification".
    """

    name = "euler"
    order = 1

    @property
    def evaluations(self) -> int:
        return self.substeps

    def step(self, velocity: Velocity, z: Tensor, tau: float, after: float, dt: float) -> Tensor:
        return heun_predict(z, velocity(z, tau), dt)


METHODS: dict[str, type[Integrator]] = {"heun": Heun, "heun2": Heun, "euler": Euler}


def make(method: str, substeps: int) -> Integrator:
    """Return an integrator by name: ``"heun"`` (also ``"heun2"``, torchdiffeq's name) or ``"euler"``.

    Raises:
        ValueError: The name is unknown, or ``substeps`` is below 1.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(map(repr, METHODS))}")
    return METHODS[method](substeps)


def integrate(velocity: Velocity, z: Tensor, *, method: str = "heun", substeps: int = 2, start: float = 0.0, end: float = 1.0) -> Tensor:
    """Integrate a velocity field by a named method, as ``make(method, substeps)(velocity, z)``.

    Args:
        velocity: Called as ``velocity(z, tau)``; torchdiffeq's functions take the time first.
        z: State at ``start``, ``[..., D]``, float32 or float64.
        method: ``"heun"`` or ``"euler"``.
        substeps: Number K of substeps, at least 1.
        start: Time of ``z``.
        end: Time of the result.

    Raises:
        ValueError: The method is unknown, ``substeps`` is below 1, or as for :class:`Integrator`.
    """
    return make(method, substeps)(velocity, z, start=start, end=end)
