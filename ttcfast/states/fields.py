"""The layout of states of any physics, declared by the names of their channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .base import TERMS, Bounds, Names, StateSpec
from .symmetry import Symmetry


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
    symmetries: tuple[Symmetry, ...] = ()
    translations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        if not names or len(set(names)) != len(names) or not all(isinstance(name, str) for name in names):
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
        self._set("bounds", {name: self._interval(name, self.bounds[name]) for name in self._known("bounds", tuple(self.bounds))})
        if self.spacing is not None:
            self._set("spacing", tuple(float(h) for h in self.spacing))
            if len(self.spacing) != self.ndim or not all(0 < h < math.inf for h in self.spacing):
                raise ValueError(f"spacing is {self.spacing}; give one distance above 0 for each of {self.ndim} dimensions")
        self._set("symmetries", tuple(Symmetry.of(each, self.ndim) for each in self.symmetries))
        for g in self.symmetries:
            self._known("an odd channel of symmetries", g.odd)
        self._set("translations", tuple(self.translations))
        if len(set(self.translations)) != len(self.translations) or not all(
            0 <= k < self.ndim and self.periodic_axes[k] for k in self.translations
        ):
            raise ValueError(f"translations is {self.translations}; name periodic axes, from 0 to {self.ndim - 1}, each once")
        assert self.distances  # found here, since a cell volume on a device is waited for
        self.conserved_groups, self.bounded_channels, self.solenoidal  # noqa: B018  (found here, for every score asks for them)

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
            others = (*self.given, *self.mean_zero)
            given = tuple(name for name in self.names if name not in others) if given == "all" else (given,)
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
    def _interval(name: str, ends: Any) -> Bounds:
        wrong = ValueError(f"bounds of {name!r} are {ends!r}; give a smaller number and a larger one, None for no bound")
        if not isinstance(ends, (tuple, list)) or len(ends) != 2 or not all(end is None or isinstance(end, (int, float)) for end in ends):
            raise wrong
        low, high = (-math.inf if ends[0] is None else float(ends[0])), (math.inf if ends[1] is None else float(ends[1]))
        if not low < high:  # nor where one is NaN
            raise wrong
        return (None if low == -math.inf else low), (None if high == math.inf else high)

    def _channels(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(map(self.names.index, names))

    @functools.cached_property
    def conserved_groups(self) -> dict[str, tuple[int, ...]]:
        return {name: self._channels(channels) for name, channels in self.conserved.items()}

    @property
    def given_channels(self) -> tuple[int, ...]:
        return self._channels(self.given)

    @functools.cached_property
    def bounded_channels(self) -> dict[int, Bounds]:
        return {self.names.index(name): ends for name, ends in self.bounds.items()}

    @functools.cached_property
    def solenoidal(self) -> tuple[tuple[int, ...], ...]:
        """Channels of each vector field without divergence."""
        return tuple(map(self._channels, self.divergence_free))

    @property
    def vectors(self) -> tuple[tuple[int, ...], ...]:
        groups = [group for group in self.conserved_groups.values() if len(group) == self.ndim > 1]
        stems = [name[:-2] for name in self.names if name.endswith("_x") and self.ndim > 1]
        components = [[f"{stem}_{axis}" for axis in "xyz"[: self.ndim]] for stem in stems]
        named = [self._channels(vector) for vector in components if set(vector) <= set(self.names)]
        return tuple(dict.fromkeys([*self.solenoidal, *groups, *named]))

    @functools.cached_property
    def distances(self) -> tuple[float, ...]:
        """Distance of cells along each axis."""
        if self.spacing is not None:
            return self.spacing
        volume = float(self.cell_volume.mean()) if torch.is_tensor(self.cell_volume) else self.cell_volume
        return (volume ** (1 / self.ndim),) * self.ndim
