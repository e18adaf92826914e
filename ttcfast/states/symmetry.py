"""Symmetries of the equations on a grid: exchanges of axes, reflections and shifts, and what they do to a state."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.transfer import sent

if TYPE_CHECKING:
    from .base import StateSpec

MOST = 192  # elements of a group; a cube has 48, and twice that with a shift by half its side


@dataclass(frozen=True)
class Symmetry:
    """A map of the grid onto itself under which the equations hold: axes are exchanged, then mirrored, then shifted.

    Components of vectors are exchanged and change sign with their axes.

    Args:
        order: Entry k is the axis of the state that becomes axis k; () leaves the axes as they are.
        flips: Whether each axis of the result is mirrored, cell 0 with the last one; () mirrors none.
        shifts: Cells by which each axis of the result is shifted; () shifts none.
        odd: Channels that change sign, such as vorticity under a reflection.
    """

    order: tuple[int, ...] = ()
    flips: tuple[bool, ...] = ()
    shifts: tuple[int, ...] = ()
    odd: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Symmetry | Mapping[str, Any], ndim: int) -> Symmetry:
        """Return a symmetry with an entry for each of ``ndim`` axes; raise ``ValueError`` if it describes none."""
        try:
            given = value if isinstance(value, Symmetry) else cls(**value)
            order, flips = tuple(given.order) or tuple(range(ndim)), tuple(map(bool, given.flips)) or (False,) * ndim
            shifts, odd = tuple(map(int, given.shifts)) or (0,) * ndim, tuple(sorted(given.odd))
        except TypeError as error:
            raise ValueError(f"symmetries holds {value!r}, which is no Symmetry(order=, flips=, shifts=, odd=)") from error
        if sorted(order) != list(range(ndim)) or len(flips) != ndim or len(shifts) != ndim:
            raise ValueError(f"symmetries holds {given}; give an entry for each of {ndim} axes, order with each of them once")
        return cls(order, flips, shifts, odd)

    def after(self, first: Symmetry, shape: Sequence[int]) -> Symmetry:
        """Return the symmetry that acts as ``first`` and then this one on a grid of ``shape``."""
        order, flips, shifts = [], [], []
        for k, (flip, shift) in enumerate(zip(self.flips, self.shifts)):
            m, n = self.order[k], shape[k]
            # along axis k of the result, the cell of ours that is read, and from there the cell of the first
            (sign, start), (sign_before, start_before) = _read(flip, shift, n), _read(first.flips[m], first.shifts[m], n)
            turned = sign * sign_before < 0
            begin = sign_before * start + start_before
            order.append(first.order[m])
            flips.append(turned)
            shifts.append((begin - (n - 1) if turned else -begin) % n)
        return Symmetry(tuple(order), tuple(flips), tuple(shifts), tuple(sorted(set(self.odd) ^ set(first.odd))))

    def apply(self, x: Tensor, spec: StateSpec) -> Tensor:
        """Return states ``[..., C, *S]`` under this symmetry."""
        d = spec.ndim
        y = x.movedim([axis - d for axis in self.order], list(range(-d, 0)))
        y = y.flip([k - d for k in range(d) if self.flips[k]]).roll(self.shifts, list(range(-d, 0)))
        return self._exchanged(y, spec, {k: self.order[k] for k in range(d)}, self.flips)

    def undo(self, y: Tensor, spec: StateSpec) -> Tensor:
        """Return the states ``[..., C, *S]`` that ``apply`` takes to ``y``."""
        d = spec.ndim
        x = y.roll([-shift for shift in self.shifts], list(range(-d, 0))).flip([k - d for k in range(d) if self.flips[k]])
        x = x.movedim(list(range(-d, 0)), [axis - d for axis in self.order])
        back = {axis: k for k, axis in enumerate(self.order)}
        return self._exchanged(x, spec, back, [self.flips[back[k]] for k in range(d)])

    def _exchanged(self, x: Tensor, spec: StateSpec, source: Mapping[int, int], flips: Sequence[bool]) -> Tensor:
        """Exchange components of vectors, and negate those along mirrored axes and the odd channels."""
        channels, axis = list(x.unbind(-spec.ndim - 1)), -spec.ndim - 1
        parts = list(channels)
        for vector in spec.vectors:
            for k, c in enumerate(vector):
                parts[c] = -channels[vector[source[k]]] if flips[k] else channels[vector[source[k]]]
        for name in self.odd:
            c = spec.names.index(name)
            parts[c] = -parts[c]
        return torch.stack(parts, axis)


def _read(flip: bool, shift: int, n: int) -> tuple[int, int]:
    """Sign and start of the cell that is read for cell i: ``sign * i + start`` modulo n."""
    return (-1, n - 1 + shift) if flip else (1, -shift)


def group_of(spec: StateSpec, shape: Sequence[int]) -> list[Symmetry]:
    """Return all symmetries that the layout's own generate on a grid of ``shape``, the identity first.

    Raises:
        ValueError: A symmetry exchanges axes of other sizes, or there are more than ``MOST``.
    """
    for g in spec.symmetries:
        if any(shape[k] != shape[axis] for k, axis in enumerate(g.order)):
            raise ValueError(f"symmetries holds {g}, which exchanges axes of other sizes on a grid of {tuple(shape)} cells")
    identity = Symmetry.of(Symmetry(), spec.ndim)
    found, latest = {identity: None}, [identity]
    while latest:
        made = [g.after(h, shape) for h, g in itertools.product(latest, spec.symmetries)]
        latest = list(dict.fromkeys(g for g in made if g not in found))
        found |= dict.fromkeys(latest)
        if len(found) > MOST:
            raise ValueError(f"symmetries make a group of more than {MOST} elements; declare shifts by any number of cells as translations")
    return list(found)


class Frames:
    """The symmetry under which each candidate is computed: a function of random seed, step, problem and candidate id.

    Id 0 has the identity. The next ids have the other elements of the group in random order, then they have all of them once more with
    random translations, and so on.

    Args:
        spec: Layout, with the symmetries.
        shape: Cells.
        ids: ``[N, B]``.
        problem_ids: ``[N]``.
        seed, step: Random seed and step.

    Raises:
        ValueError: The layout declares no symmetry, or as ``group_of``.
    """

    def __init__(self, spec: StateSpec, shape: Sequence[int], ids: Tensor, problem_ids: Tensor, *, seed: int, step: int) -> None:
        self.spec = spec
        group, free = group_of(spec, shape), spec.translations
        if len(group) == 1 and not free:
            raise ValueError("stochastic.symmetry is true and the layout declares no symmetry; give StateSpec symmetries= or translations=")
        self.elements: list[list[Symmetry]] = []
        for problem, own in zip(problem_ids.tolist(), ids.tolist()):
            order = [0, *(1 + np.random.default_rng([seed, step, problem]).permutation(len(group) - 1)).tolist()]
            row = []
            for number in own:
                cycle, place = divmod(number, len(group))
                element = group[order[place]]
                if cycle and free:
                    rng = np.random.default_rng([seed, step, problem, cycle])
                    shifts = tuple(int(rng.integers(shape[k])) if k in free else 0 for k in range(spec.ndim))
                    element = Symmetry.of(Symmetry(shifts=shifts), spec.ndim).after(element, shape)
                row.append(element)
            self.elements.append(row)

    def into(self, x: Tensor) -> Tensor:
        """Return states ``[N, B, ..., C, *S]`` as each candidate's symmetry shows them."""
        return self._each(Symmetry.apply, x)

    def back(self, y: Tensor) -> Tensor:
        """Return the states ``[N, B, ..., C, *S]`` that ``into`` takes to ``y``."""
        return self._each(Symmetry.undo, y)

    def _each(self, act: Callable[[Symmetry, Tensor, StateSpec], Tensor], x: Tensor) -> Tensor:
        """Act on all states of a symmetry at once."""
        flat = x.flatten(0, 1)
        out, rows = torch.empty_like(flat), dict[Symmetry, list[int]]()
        for number, g in enumerate(itertools.chain(*self.elements)):
            rows.setdefault(g, []).append(number)
        for g, own in rows.items():
            index = sent(torch.tensor(own), x.device)
            out[index] = act(g, flat[index], self.spec)
        return out.view_as(x)
