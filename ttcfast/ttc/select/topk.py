"""Keeps the best k of a stream of scored states; only states among the best so far are copied."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.ops.topk import topk

NO_ID = 2**40
"""The id of an empty place; candidate ids are smaller."""


@dataclass
class Keys:
    """The values that decide over candidates, each ``[n, m]``.

    Attributes:
        rank: float64, larger is better; -inf where a candidate cannot be taken.
        ids: int64, unique within a group; the smaller id wins a tie.
        scores: float64, carried along.
        ties: float64, the larger value wins a tie before the ids decide; None where only the ids do.
        marks: int64, equal for equal states; None where duplicates do not matter.
    """

    rank: Tensor
    ids: Tensor
    scores: Tensor
    ties: Tensor | None = None
    marks: Tensor | None = None

    def columns(self) -> dict[str, Tensor]:
        return {name: value for name in ("rank", "ids", "scores", "ties", "marks") if (value := getattr(self, name)) is not None}

    def at(self, index: Tensor) -> Keys:
        """The entries ``[n, k]`` at positions ``index``."""
        return Keys(**{name: value.gather(1, index) for name, value in self.columns().items()})

    def rows(self, rows: slice | Tensor) -> Keys:
        return Keys(**{name: value[rows] for name, value in self.columns().items()})

    def beside(self, other: Keys) -> Keys:
        """Both, joined along the second axis."""
        theirs = other.columns()
        return Keys(**{name: torch.cat([value, theirs[name]], 1) for name, value in self.columns().items()})

    def among(self, wanted: Tensor) -> Keys:
        """The same keys, of which those outside ``wanted [n, m]`` cannot be taken."""
        return Keys(**{**self.columns(), "rank": self.rank.masked_fill(~wanted, -torch.inf)})


def best(keys: Keys, k: int) -> tuple[Keys, Tensor]:
    """The ``k`` best of every row, best first: by rank, then ``ties``, then the smaller id, without duplicates of a better one.

    Returns:
        Their keys and their positions ``[n, k]``. Places beyond the last candidate that can be taken have rank -inf and id ``NO_ID``.
    """
    width = keys.rank.shape[1]
    if keys.marks is not None:
        keys = keys.among(~_duplicates(keys))
    positions = torch.arange(width, device=keys.ids.device)
    if keys.ties is None:
        if width > 2**22:
            raise ValueError(f"a chunk holds {width} candidates of one problem; at most {2**22} can be told apart: set a chunk_size")
        _, packed = topk(keys.rank, k, ids=keys.ids * width + positions)  # one number holds both id and position
        index = packed % width
    else:
        order = _by_tie_and_id(keys)
        place = torch.empty_like(order).scatter_(1, order, positions.expand_as(order))
        _, places = topk(keys.rank, k, ids=place)
        index = order.gather(1, places)
    found = keys.at(index)
    found.ids = found.ids.masked_fill(found.rank == -torch.inf, NO_ID)
    return found, index


def marks_of(states: Tensor, axes: int) -> Tensor:
    """An int64 for each state beyond the first ``axes`` axes. Equal states have equal marks; others differ up to a chance of 2^-64."""
    flat = (states + 0.0).contiguous().flatten(axes)  # -0 becomes +0
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()])
    generator = torch.Generator().manual_seed(flat.shape[-1])
    weights = torch.randint(-(2**62), 2**62, flat.shape[-1:], generator=generator) * 2 + 1
    return (words.long() * weights.to(words.device)).sum(-1)


class TopPool:
    """The ``k`` best states of each of ``n`` groups, in ``k`` slots per group, and their keys in order.

    A state that enters the best is copied into the slot of one that left them, and no other state moves, so that about
    ``k (1 + ln(B / k))`` of B candidates in random order are copied. Neither keys nor result depend on the order or the chunks in which
    candidates come.

    Args:
        state: One state ``[C, *S]``, for its shape, dtype and device.
        n, k: Number of groups, and of slots in each.
        ties, marks: Whether keys come with these columns.
    """

    def __init__(self, state: Tensor, n: int, k: int, *, ties: bool = False, marks: bool = False) -> None:
        self.k, self.copies = k, 0
        self.states = state.new_empty((n, k, *state.shape))
        lowest = torch.full((n, k), -torch.inf, dtype=torch.float64, device=state.device)
        ids = torch.full((n, k), NO_ID, device=state.device)
        self.keys = Keys(lowest, ids, lowest.clone(), lowest.clone() if ties else None, torch.zeros_like(ids) if marks else None)
        self._slots = torch.arange(k, device=state.device).expand(n, k).clone()

    def add(self, groups: slice, keys: Keys, states: Tensor, row: Tensor, column: Tensor) -> None:
        """Take in a chunk.

        Args:
            groups: The P groups that the chunk belongs to.
            keys: Keys of its candidates, ``[P, m]``.
            states: ``[R, b, C, *S]``.
            row, column: int64 ``[P, m]``, index of each candidate's state in ``states``.
        """
        if not bool((keys.rank.amax(1) >= self.keys.rank[groups, -1]).any()):
            return
        held, slots = self.keys.rows(groups), self._slots[groups]
        found, index = best(held.beside(keys), self.k)
        taken = found.rank > -torch.inf
        stays, comes = taken & (index < self.k), taken & (index >= self.k)
        at = torch.where(stays, index, 0)
        kept = torch.zeros_like(at).scatter_add_(1, at, stays.long())
        free = slots.gather(1, kept.argsort(dim=1, stable=True))  # the slots of those that left come first
        vacancy = ((~stays).cumsum(1) - 1).clamp_min(0)
        new_slots = torch.where(stays, slots.gather(1, at), free.gather(1, vacancy))
        group, place = comes.nonzero(as_tuple=True)
        source = index[group, place] - self.k
        self.states[groups][group, new_slots[group, place]] = states[row[group, source], column[group, source]]
        self.copies += len(group)
        self._slots[groups] = new_slots
        for name, value in found.columns().items():
            getattr(self.keys, name)[groups] = value

    def fill(self, keys: Keys, group: Tensor, place: Tensor, states: Tensor) -> None:
        """Replace all keys ``[n, k]``, and the states at ``group``, ``place`` by ``states [m, C, *S]``."""
        self.keys, self._slots = keys, torch.arange(self.k, device=self._slots.device).expand_as(self._slots).clone()
        self.states[group, place] = states

    def replace(self, groups: Tensor, other: TopPool, theirs: Tensor) -> None:
        """Take over the groups ``theirs`` of ``other`` as ``groups``."""
        self.states[groups], self._slots[groups] = other.states[theirs], other._slots[theirs]
        for name, value in other.keys.columns().items():
            getattr(self.keys, name)[groups] = value[theirs]
        self.copies += other.copies

    @property
    def taken(self) -> Tensor:
        """Whether a place holds a survivor, bool ``[n, k]``, best first."""
        return self.keys.rank > -torch.inf

    def states_of(self, group: Tensor, place: Tensor) -> Tensor:
        """A copy of the states ``[m, C, *S]`` at these places, counted from the best, of these groups."""
        return self.states[group, self._slots[group, place]]


def _duplicates(keys: Keys) -> Tensor:
    """Whether a candidate has the mark of a better one, bool ``[n, m]``."""
    assert keys.marks is not None
    order = _by_tie_and_id(keys)
    order = order.gather(1, (-keys.rank).gather(1, order).argsort(dim=1, stable=True))
    order = order.gather(1, keys.marks.gather(1, order).argsort(dim=1, stable=True))
    marks, usable = keys.marks.gather(1, order), keys.rank.gather(1, order) > -torch.inf
    same = torch.zeros_like(usable)
    same[:, 1:] = (marks[:, 1:] == marks[:, :-1]) & usable[:, :-1]
    return torch.zeros_like(same).scatter_(1, order, same)


def _by_tie_and_id(keys: Keys) -> Tensor:
    order = keys.ids.argsort(dim=1, stable=True)
    if keys.ties is None:
        return order
    return order.gather(1, (-keys.ties).gather(1, order).argsort(dim=1, stable=True))
