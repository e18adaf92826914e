"""The layout of a compressible gas."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ttcfast.checks import one_of

from .base import StateSpec
from .symmetry import Symmetry


@dataclass(frozen=True, eq=False, kw_only=True)
class EulerSpec(StateSpec):
    """Layout of a compressible gas: density, momentum or velocity, energy or pressure, and the ideal gas law that connects them.

    Args:
        density: Channel of the density.
        momentum: Channels of the momentum (conserved variables) or velocity (primitive variables), one per component.
        energy: Channel of the total energy density, or None if it is computed from the pressure.
        pressure: Channel of the pressure. Required for ``variables="primitive"``, optional otherwise.
        variables: ``"conserved"`` (rho, rho u, E) or ``"primitive"`` (rho, u, p).
        gamma: Ratio of specific heats: a number above 1, or a tensor ``[N]`` with one value per problem.
        closed: Whether every non-periodic side is a wall, so that mass and energy (but not momentum) are conserved. Conservation can be
            imposed only where every dimension is periodic or the domain is closed.
        extra: Channels that no physical term reads, such as tracers.

    Raises:
        ValueError: A channel that is named twice or is negative, a missing pressure, gamma <= 1, or as for ``StateSpec``.

    Source: TTC plan, "Analytical Reward Model (ARM)"; docs/design/decisions.md ("Declared layouts").
    """

    density: int = field(default=0, kw_only=False)
    momentum: tuple[int, ...] = field(default=(1, 2), kw_only=False)
    energy: int | None = field(default=3, kw_only=False)
    pressure: int | None = None
    variables: Literal["conserved", "primitive"] = "conserved"
    gamma: float | Tensor = 1.4
    closed: bool = False
    extra: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "momentum", tuple(self.momentum))
        object.__setattr__(self, "extra", tuple(self.extra))
        one_of("variables", self.variables, ("conserved", "primitive"))
        used = self.channels
        if min(used) < 0 or len(set(used)) != len(used):
            raise ValueError(f"channels are {used}; each must be a different index of 0 or more")
        if not self.momentum:
            raise ValueError("momentum is (); name at least one momentum or velocity channel")
        if self.variables == "primitive" and self.pressure is None:
            raise ValueError("pressure is None; with variables='primitive' name the pressure channel")
        if self.variables == "conserved" and self.energy is None:
            raise ValueError("energy is None; with variables='conserved' name the energy channel")
        if not torch.is_tensor(self.gamma) and not 1 < self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; it must be above 1")
        if torch.is_tensor(self.gamma) and (self.gamma.ndim > 1 or not bool((self.gamma > 1).all())):
            raise ValueError(f"gamma has shape {tuple(self.gamma.shape)} and minimum {self.gamma.min():g}; give [N] values above 1")

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """Reflections of each axis and exchanges of axes with the same boundaries, of cubes; none where cells or a boundary are marked."""
        d, wraps = self.ndim, self.periodic_axes
        if len(self.momentum) != d or torch.is_tensor(self.cell_volume) or self.boundary_mask is not None:
            return ()
        mirrors = [Symmetry(flips=tuple(axis == k for axis in range(d))) for k in range(d)]
        pairs = [k for k in range(d - 1) if wraps[k] == wraps[k + 1]]
        swaps = [Symmetry(order=tuple({k: k + 1, k + 1: k}.get(axis, axis) for axis in range(d))) for k in pairs]
        return tuple(Symmetry.of(each, d) for each in [*mirrors, *swaps])

    @property
    def translations(self) -> tuple[int, ...]:
        return tuple(k for k, wraps in enumerate(self.periodic_axes) if wraps) if self.symmetries else ()

    @property
    def channels(self) -> tuple[int, ...]:
        """All named channels, in the order density, momentum, energy, pressure, extra."""
        named = [self.density, *self.momentum]
        named += [c for c in (self.energy, self.pressure) if c is not None]
        return (*named, *self.extra)

    @property
    def num_channels(self) -> int:
        """The smallest number of channels that a state of this layout can have."""
        return max(self.channels) + 1

    @property
    def meaning(self) -> tuple[Any, ...]:
        return self.variables, self.density, self.momentum, self.energy, self.pressure, self.extra

    @property
    def names(self) -> tuple[str, ...]:
        flow = "momentum" if self.variables == "conserved" else "velocity"
        found = {self.energy: "energy", self.pressure: "pressure", self.density: "density"}
        found |= {c: f"{flow} {k}" for k, c in enumerate(self.momentum)}
        return tuple(found.get(c, "extra") for c in range(self.num_channels))

    @property
    def conserved_groups(self) -> dict[str, tuple[int, ...]]:
        """Mass, momentum and energy where their channels are stored and the domain keeps them: mass and energy between walls."""
        if self.variables != "conserved" or not (all(self.periodic_axes) or self.closed):
            return {}
        assert self.energy is not None
        found = {"mass": (self.density,), "momentum": self.momentum, "energy": (self.energy,)}
        return {name: group for name, group in found.items() if name != "momentum" or all(self.periodic_axes)}

    def of_problems(self, problem_ids: Tensor | None, repeats: int = 1) -> Any:
        gamma = self.gamma
        if not torch.is_tensor(gamma) or gamma.numel() == 1:
            return self
        own = gamma if problem_ids is None else gamma[problem_ids.to(gamma.device)]
        return self._with(gamma=own.repeat_interleave(repeats))

    @property
    def vectors(self) -> tuple[tuple[int, ...], ...]:
        return (self.momentum,)
