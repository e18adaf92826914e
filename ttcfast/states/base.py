"""The base class of layouts, and the ways to make one."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.transfer import sent

from .symmetry import Symmetry

if TYPE_CHECKING:
    from .euler import EulerSpec
    from .fields import FieldSpec

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

    _kinds: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        StateSpec._kinds[cls.__name__] = cls

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(StateSpec._kinds["EulerSpec"] if cls is StateSpec else cls)

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
        flags = self.periodic if isinstance(self.periodic, (tuple, list)) else (self.periodic,) * self.ndim
        if len(flags) != self.ndim or not all(isinstance(flag, (bool, np.bool_)) for flag in flags):
            raise ValueError(f"periodic is {self.periodic!r}; give true or false, or {self.ndim} of them")
        if isinstance(self.periodic, (tuple, list)):
            object.__setattr__(self, "periodic", tuple(map(bool, flags)))

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
    def symmetries(self) -> tuple[Symmetry, ...]:
        """Symmetries of the equations, from which all others follow."""
        return ()

    @property
    def translations(self) -> tuple[int, ...]:
        """Space axes along which a shift by any number of cells is a symmetry."""
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
        moved = {name: sent(v, device) for name, v in held.items() if torch.is_tensor(v) and v.device != device}
        return self._with(**moved) if moved else self

    def _with(self, **values: Any) -> Any:
        """Return a copy with values that have been checked before, since a check would wait for the device."""
        other = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(other, name, value)
        return other

    def to_meta(self, *, boundary: bool = False) -> dict[str, Any]:
        """Return the layout as JSON for ``from_meta``, tensors as lists; those of a boundary, which belong to the data, on request."""
        held = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not boundary:
            held = {name: value for name, value in held.items() if not name.startswith("boundary")}
        if "symmetries" in held:
            held["symmetries"] = [dataclasses.asdict(g) for g in self.symmetries]
        held = {name: value for name, value in held.items() if name not in ("symmetries", "translations") or value}
        return {name: value.tolist() if torch.is_tensor(value) else value for name, value in held.items()}

    @staticmethod
    def from_meta(meta: Mapping[str, Any]) -> StateSpec:
        """Return the layout that ``to_meta`` described; lists stand for tensors.

        Raises:
            TypeError, ValueError: The entries describe no layout.
        """
        kinds = {"gamma": torch.float64, "cell_volume": torch.float64, "boundary_mask": torch.bool, "boundary_value": None}
        tensors = {n: torch.tensor(meta[n], dtype=kind) for n, kind in kinds.items() if isinstance(meta.get(n), list)}
        made: StateSpec = StateSpec._kinds["FieldSpec" if "names" in meta else "EulerSpec"](**{**meta, **tensors})
        return made

    def carried(self, new: Tensor, old: Tensor, *, channel_axis: int) -> Tensor:
        """Return ``new`` with the given channels of ``old``, a state of the same shape."""
        if not self.given_channels:
            return new
        pairs = zip(new.unbind(channel_axis), old.unbind(channel_axis))  # no index, which would be copied to the device at every step
        return torch.stack([y if c in self.given_channels else x for c, (x, y) in enumerate(pairs)], channel_axis)

    def predicted(self, x: Tensor, *, channel_axis: int) -> Tensor:
        """Return ``x`` without the given channels, which are no model's error."""
        if not self.given_channels:
            return x
        return torch.stack([part for c, part in enumerate(x.unbind(channel_axis)) if c not in self.given_channels], channel_axis)

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
        symmetries: Sequence[Symmetry | Mapping[str, Any]] = (),
        translations: Sequence[int] = (),
        boundary_mask: Tensor | None = None,
        boundary_value: float | Tensor | None = None,
    ) -> FieldSpec:
        """Declare states of any physics by the names of their channels.

        Args:
            names: Name of each channel, in order; one is enough.
            ndim, periodic, cell_volume, boundary_mask, boundary_value: As for the class.
            conserved: What each step keeps the integral of: ``"all"`` channels besides those given or of mean zero, some by name, or
                channels grouped under the name of a quantity, such as ``{"mass": "h", "momentum": ("hu", "hv")}``. A search scores the
                integrals' changes and a projection removes them, so declare what the exact dynamics conserve on this domain.
            bounds: Least and largest value of channels, None for none: ``{"h": (0, None)}``.
            divergence_free: Components of a vector field without divergence, one per dimension, or several such fields.
            mean_zero: Channels whose mean is zero, such as a pressure that is known up to a constant.
            given: Channels that a model reads and does not predict: forcing, masks, coordinates. Every step carries them on unchanged.
            spacing: Distance of cells along each axis, for divergences; None means cubes of ``cell_volume``.
            symmetries: Symmetries of the equations, ``Symmetry(order=, flips=, shifts=, odd=)``; all that they generate are used.
            translations: Space axes, all periodic, along which a shift by any number of cells is a symmetry.

        Raises:
            ValueError: No channel, two of one name, a name that is no channel (the message lists them), a quantity without channels or
                with one that another has, bounds that exclude each other, a divergence of other than ``ndim`` components, or an argument
                out of range.

        Source: docs/design/decisions.md ("Declared physics").
        """
        options: dict[str, Any] = {"ndim": ndim, "periodic": periodic, "cell_volume": cell_volume, "spacing": spacing}
        options |= {"boundary_mask": boundary_mask, "boundary_value": boundary_value, "given": given, "mean_zero": mean_zero}
        options |= {"conserved": conserved, "divergence_free": divergence_free, "bounds": {} if bounds is None else bounds}
        options |= {"symmetries": symmetries, "translations": translations}
        made: FieldSpec = StateSpec._kinds["FieldSpec"](names=names, **options)
        return made

    @classmethod
    def euler1d(cls, **changes: Any) -> EulerSpec:
        """rho, rho u, E in one dimension."""
        return _euler({"momentum": (1,), "energy": 2, "ndim": 1, **changes})

    @classmethod
    def euler2d(cls, **changes: Any) -> EulerSpec:
        """rho, rho u, rho v, E in two dimensions: the layout of our own solver and files."""
        return _euler({"ndim": 2, **changes})

    @classmethod
    def euler3d(cls, **changes: Any) -> EulerSpec:
        """rho, rho u, rho v, rho w, E in three dimensions."""
        return _euler({"momentum": (1, 2, 3), "energy": 4, "ndim": 3, **changes})

    @classmethod
    def pdegym(cls, **changes: Any) -> EulerSpec:
        """rho, u, v, p, as in PDEGym and Poseidon; name a fifth channel (E, or the tracer of CE-RM) by ``energy`` or ``extra``."""
        return _euler({"energy": None, "pressure": 3, "variables": "primitive", **changes})

    @classmethod
    def well(cls, **changes: Any) -> EulerSpec:
        """energy, density, pressure, momentum_x, momentum_y of The Well's Euler sets."""
        return _euler({"density": 1, "momentum": (3, 4), "energy": 0, "pressure": 2, **changes})

    @classmethod
    def pdebench(cls, **changes: Any) -> EulerSpec:
        """Vx, Vy, density, pressure in PDEBench's loader order, gamma 5/3."""
        layout = {"density": 2, "momentum": (0, 1), "energy": None, "pressure": 3, "variables": "primitive", "gamma": 5 / 3}
        return _euler({**layout, **changes})


def _euler(options: dict[str, Any]) -> EulerSpec:
    made: EulerSpec = StateSpec._kinds["EulerSpec"](**options)
    return made
