"""Declares the layout of a state: what its channels are, what of them is conserved or bounded, and the domain that they live on.

``StateSpec.fields`` declares states of any physics by the names of their channels; ``EulerSpec`` is the layout of a compressible gas, whose
pressure law the channels' names alone do not tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ttcfast.checks import one_of

Bounds: TypeAlias = tuple[float | None, float | None]
Names: TypeAlias = str | Sequence[str]

TERMS = ("boundary", "bounds", "divergence", "mean", "positivity", "finite", "score")  # of a score, besides the conserved quantities


@dataclass(frozen=True, eq=False, kw_only=True)
class StateSpec:
    """Layout of a state: the meaning of its channels and the grid they live on.

    ``StateSpec.fields(...)`` makes the layout of any physics. ``StateSpec(density=0, momentum=(1, 2), ...)`` makes an ``EulerSpec``, as do
    the presets ``euler1d`` to ``pdebench``.

    Args:
        cell_volume: Volume of a cell: a positive number, or a tensor ``[*S]``.
        ndim: Number of space dimensions, 1 to 3.
        periodic: Whether the domain is periodic: True, or one flag per dimension.
        boundary_mask: Bool ``[*S]``, cells whose value is prescribed; None for no boundary penalty.
        boundary_value: Prescribed values: a number, or a tensor that broadcasts to ``[C, *S]``; None means 0.

    Raises:
        ValueError: A cell volume <= 0, ndim outside 1..3, a mask or flags of other dimensions.

    Source: docs/design/decisions.md ("Declared layouts"), ("Declared physics").
    """

    cell_volume: float | Tensor = 1.0
    ndim: int = 2
    periodic: bool | tuple[bool, ...] = True
    boundary_mask: Tensor | None = None
    boundary_value: float | Tensor | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(EulerSpec if cls is StateSpec else cls)

    def __post_init__(self) -> None:
        one_of("ndim", self.ndim, (1, 2, 3))
        volume = self.cell_volume
        if torch.is_tensor(volume) and volume.ndim not in (0, self.ndim):
            raise ValueError(f"cell_volume has shape {tuple(volume.shape)}; give a number or one value per cell in {self.ndim} dimensions")
        if not (bool(((volume > 0) & (volume < math.inf)).all()) if torch.is_tensor(volume) else 0 < volume < math.inf):
            raise ValueError(
                f"cell_volume is {volume if not torch.is_tensor(volume) else float(volume.min())}; it must be positive and finite"
            )
        mask = self.boundary_mask
        if mask is not None and (mask.dtype != torch.bool or mask.ndim != self.ndim):
            raise ValueError(f"boundary_mask is {mask.dtype} {tuple(mask.shape)}; give a bool mask over the {self.ndim} space dimensions")
        if isinstance(self.periodic, (tuple, list)):
            object.__setattr__(self, "periodic", tuple(bool(p) for p in self.periodic))
            if len(self.periodic_axes) != self.ndim:
                raise ValueError(f"periodic is {self.periodic}; give one flag or {self.ndim} of them")

    if TYPE_CHECKING:

        @property
        def names(self) -> tuple[str, ...]: ...  # of every channel, in order

    @property
    def num_channels(self) -> int:
        """The smallest number of channels that a state of this layout can have."""
        return len(self.names)

    @property
    def conserved_groups(self) -> dict[str, tuple[int, ...]]:
        """Channels of each conserved quantity by its name; a vector has one channel per component."""
        raise NotImplementedError

    @property
    def conserved_channels(self) -> tuple[int, ...]:
        """Channels whose integral a projection may hold constant on this domain."""
        return tuple(c for group in self.conserved_groups.values() for c in group)

    @property
    def vectors(self) -> tuple[tuple[int, ...], ...]:
        """Channels of each vector field, one per space dimension, whose components a reflection or a turn of the domain exchanges."""
        return ()

    @property
    def given_channels(self) -> tuple[int, ...]:
        """Channels that a model is given and does not predict."""
        return ()

    @property
    def gamma(self) -> Any:
        """Ratio of specific heats of an ``EulerSpec``; None for other physics."""
        return None

    @property
    def meaning(self) -> tuple[Any, ...]:
        """What tells the channels of two layouts apart."""
        return self.names

    @property
    def periodic_axes(self) -> tuple[bool, ...]:
        return self.periodic if isinstance(self.periodic, tuple) else (self.periodic,) * self.ndim

    def replace(self, **changes: Any) -> Any:
        """Return a copy with some fields changed and checked."""
        return dataclasses.replace(self, **changes)

    def of_problems(self, problem_ids: Tensor | None, repeats: int = 1) -> Any:
        """Return the layout with the parameters of these problems, each repeated for its candidates; without ids those of all, in order."""
        return self

    def to(self, device: torch.device) -> Any:
        """Return the layout with its tensors on ``device``; itself if it has none elsewhere."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {name: v.to(device) for name, v in held.items() if torch.is_tensor(v) and v.device != device}
        return self.replace(**moved) if moved else self

    def to_meta(self) -> dict[str, Any]:
        """Return the layout as JSON for ``from_meta``, without the tensors of a boundary, which belong to the data."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.name.startswith("boundary")}

    @staticmethod
    def from_meta(meta: Mapping[str, Any]) -> StateSpec:
        """Return the layout that ``to_meta`` described; lists stand for tensors.

        Raises:
            TypeError, ValueError: The entries describe no layout.
        """
        tensors = {n: torch.tensor(meta[n], dtype=torch.float64) for n in ("gamma", "cell_volume") if isinstance(meta.get(n), list)}
        made: StateSpec = (FieldSpec if "names" in meta else EulerSpec)(**{**meta, **tensors})
        return made

    def check_state(self, name: str, x: Tensor, *, channel_axis: int) -> None:
        """Raise ``ValueError`` unless ``x`` has this layout's channels at ``channel_axis``, followed by the space axes."""
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}; give a floating-point tensor")
        if x.ndim != channel_axis + 1 + self.ndim:
            lead = ["N", "B"][:channel_axis] if channel_axis <= 2 else ["..."]
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} ({x.ndim} axes); expected [{', '.join([*lead, 'C', '*S'])}] with {self.ndim} space axes"
            )
        if x.shape[channel_axis] < self.num_channels:
            raise ValueError(
                f"{name} has {x.shape[channel_axis]} channels (shape {tuple(x.shape)}); the spec names channel {self.num_channels - 1}, "
                f"so at least {self.num_channels} are needed"
            )

    @classmethod
    def fields(
        cls,
        *names: str,
        ndim: int = 2,
        periodic: bool | tuple[bool, ...] = True,
        conserved: Literal["all"] | Sequence[str] | Mapping[str, Names] = (),
        bounds: Mapping[str, Bounds] | None = None,
        divergence_free: Sequence[str] | Sequence[Sequence[str]] = (),
        mean_zero: Names = (),
        given: Names = (),
        cell_volume: float | Tensor = 1.0,
        spacing: Sequence[float] | None = None,
        boundary_mask: Tensor | None = None,
        boundary_value: float | Tensor | None = None,
    ) -> FieldSpec:
        """Declare states of any physics by the names of their channels.

        Args:
            names: Name of each channel, in order; one is enough.
            ndim, periodic, cell_volume, boundary_mask, boundary_value: As for the class.
            conserved: What each step keeps the integral of: ``"all"`` channels that are predicted, some by name, or channels grouped under
                the name of a quantity, such as ``{"mass": "h", "momentum": ("hu", "hv")}``. A search scores the integrals' changes and a
                projection removes them, so declare what the exact dynamics conserve on this domain.
            bounds: Least and largest value of channels, None for none: ``{"h": (0, None)}``.
            divergence_free: Components of a vector field without divergence, one per dimension, or several such fields.
            mean_zero: Channels whose mean is zero, such as a pressure that is known up to a constant.
            given: Channels that a model reads and does not predict: forcing, masks, coordinates. Every step carries them on unchanged.
            spacing: Distance of cells along each axis, for divergences; None means cubes of ``cell_volume``.

        Raises:
            ValueError: No channel, two of one name, a name that is no channel (the message lists them), a quantity without channels or
                with one that another has, bounds that exclude each other, a divergence of other than ``ndim`` components, or an argument
                out of range.

        Source: docs/design/decisions.md ("Declared physics").
        """
        options: dict[str, Any] = {"ndim": ndim, "periodic": periodic, "cell_volume": cell_volume, "spacing": spacing}
        options |= {"boundary_mask": boundary_mask, "boundary_value": boundary_value, "given": given, "mean_zero": mean_zero}
        options |= {"conserved": conserved, "divergence_free": divergence_free, "bounds": {} if bounds is None else bounds}
        return FieldSpec(names=names, **options)

    @classmethod
    def euler1d(cls, **changes: Any) -> EulerSpec:
        """rho, rho u, E in one dimension."""
        return EulerSpec(**{"momentum": (1,), "energy": 2, "ndim": 1, **changes})

    @classmethod
    def euler2d(cls, **changes: Any) -> EulerSpec:
        """rho, rho u, rho v, E in two dimensions: the layout of our own solver and files."""
        return EulerSpec(**{"ndim": 2, **changes})

    @classmethod
    def euler3d(cls, **changes: Any) -> EulerSpec:
        """rho, rho u, rho v, rho w, E in three dimensions."""
        return EulerSpec(**{"momentum": (1, 2, 3), "energy": 4, "ndim": 3, **changes})

    @classmethod
    def pdegym(cls, **changes: Any) -> EulerSpec:
        """rho, u, v, p, as in PDEGym and Poseidon; name a fifth channel (E, or the tracer of CE-RM) by ``energy`` or ``extra``."""
        return EulerSpec(**{"energy": None, "pressure": 3, "variables": "primitive", **changes})

    @classmethod
    def well(cls, **changes: Any) -> EulerSpec:
        """energy, density, pressure, momentum_x, momentum_y of The Well's Euler sets."""
        return EulerSpec(**{"density": 1, "momentum": (3, 4), "energy": 0, "pressure": 2, **changes})

    @classmethod
    def pdebench(cls, **changes: Any) -> EulerSpec:
        """Vx, Vy, density, pressure in PDEBench's loader order, gamma 5/3."""
        return EulerSpec(
            **{"density": 2, "momentum": (0, 1), "energy": None, "pressure": 3, "variables": "primitive", "gamma": 5 / 3, **changes}
        )


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
        return self.replace(gamma=own.repeat_interleave(repeats))

    @property
    def vectors(self) -> tuple[tuple[int, ...], ...]:
        return (self.momentum,)


@dataclass(frozen=True, eq=False, kw_only=True)
class FieldSpec(StateSpec):
    """Layout of any physics; see ``StateSpec.fields`` for its arguments, which this class takes in any of their forms."""

    names: tuple[str, ...]
    conserved: Mapping[str, Names] = field(default_factory=dict)
    bounds: Mapping[str, Bounds] = field(default_factory=dict)
    divergence_free: tuple[tuple[str, ...], ...] = ()
    mean_zero: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names are {names}; give at least one channel, each by a name of its own")
        self._set("names", names)
        self._set("given", self._known("given", self.given))
        self._set("mean_zero", self._known("mean_zero", self.mean_zero))
        self._set("conserved", self._quantities())
        vectors: Sequence[Any] = self.divergence_free
        vectors = [vectors] if vectors and isinstance(vectors[0], str) else vectors
        self._set("divergence_free", tuple(self._known("divergence_free", vector) for vector in vectors))
        for vector in self.divergence_free:
            if len(vector) != self.ndim or self.ndim == 1:
                raise ValueError(f"divergence_free is {vector} in {self.ndim} dimensions; name the components of a vector field")
        self._set("bounds", {name: self._interval(name, *self.bounds[name]) for name in self._known("bounds", tuple(self.bounds))})
        if self.spacing is not None:
            self._set("spacing", tuple(float(h) for h in self.spacing))
            if len(self.spacing) != self.ndim or not all(0 < h < math.inf for h in self.spacing):
                raise ValueError(f"spacing is {self.spacing}; give one distance above 0 for each of {self.ndim} dimensions")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _known(self, argument: str, channels: Names) -> tuple[str, ...]:
        """These channels as a tuple of names."""
        chosen = (channels,) if isinstance(channels, str) else tuple(channels)
        for name in chosen:
            if name not in self.names:
                raise ValueError(f"{argument} names {name!r}, which is no channel; the channels are {', '.join(self.names)}")
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"{argument} is {chosen}; name each channel once")
        return chosen

    def _quantities(self) -> dict[str, tuple[str, ...]]:
        """The conserved quantities by name."""
        given = self.conserved
        if isinstance(given, str):
            given = tuple(name for name in self.names if name not in self.given) if given == "all" else (given,)
        if not isinstance(given, Mapping):
            given = {name: name for name in given}
        found = {name: self._known(f"conserved quantity {name!r}", channels) for name, channels in given.items()}
        for name, channels in found.items():
            if not channels:
                raise ValueError(f"conserved quantity {name!r} has no channels; name at least one of {', '.join(self.names)}")
            if name in TERMS:
                raise ValueError(f"conserved quantity {name!r} has the name of another penalty; choose one besides {', '.join(TERMS)}")
        every = [*self.mean_zero, *self.given, *(channel for channels in found.values() for channel in channels)]
        if twice := sorted({channel for channel in every if every.count(channel) > 1}):
            raise ValueError(f"{', '.join(twice)} would be conserved twice; a channel has one quantity, or is mean_zero, or given")
        return found

    @staticmethod
    def _interval(name: str, low: float | None, high: float | None) -> Bounds:
        low, high = (None if end is None else float(end) for end in (low, high))
        if math.isnan(low or 0.0) or math.isnan(high or 0.0) or (low is not None and high is not None and low >= high):
            raise ValueError(f"bounds of {name!r} are ({low}, {high}); give a smaller number and a larger one, None for no bound")
        return low, high

    def _channels(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(map(self.names.index, names))

    @property
    def conserved_groups(self) -> dict[str, tuple[int, ...]]:
        return {name: self._channels(channels) for name, channels in self.conserved.items()}

    @property
    def given_channels(self) -> tuple[int, ...]:
        return self._channels(self.given)

    @property
    def bounded_channels(self) -> dict[int, Bounds]:
        return {self.names.index(name): ends for name, ends in self.bounds.items()}

    @property
    def solenoidal(self) -> tuple[tuple[int, ...], ...]:
        """Channels of each vector field without divergence."""
        return tuple(map(self._channels, self.divergence_free))

    @property
    def vectors(self) -> tuple[tuple[int, ...], ...]:
        groups = [group for group in self.conserved_groups.values() if len(group) == self.ndim > 1]
        return tuple(dict.fromkeys([*self.solenoidal, *groups]))

    @property
    def distances(self) -> tuple[float, ...]:
        """Distance of cells along each axis."""
        if self.spacing is not None:
            return self.spacing
        volume = float(self.cell_volume.mean()) if torch.is_tensor(self.cell_volume) else self.cell_volume
        return (volume ** (1 / self.ndim),) * self.ndim
