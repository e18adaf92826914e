"""The best k of a stream of scored states: keys for all that come by, copies of those alone that are among the best so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.ops.topk import topk

NO_ID = 2**40
"""Of an empty place; candidate ids lie below it."""


@dataclass
class Keys:
    """What decides over candidates, each ``[n, m]``.

    Attributes:
        rank: float64, larger is better, -inf where a candidate cannot be taken.
        ids: int64, unique within a group; break ties.
        scores: float64, carried along.
        ties: float64, break ties before the ids do; None for none.
        marks: int64, equal where two states are; None where duplicates do not matter.
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
        """Both, along the second axis."""
        theirs = other.columns()
        return Keys(**{name: torch.cat([value, theirs[name]], 1) for name, value in self.columns().items()})


def best(keys: Keys, k: int) -> tuple[Keys, Tensor]:
    """The ``k`` best of every row, best first: by rank, then ``ties``, then the smaller id, without those whose mark equals a better one's.

    Returns:
        Their keys, and their positions ``[n, k]``. Where fewer can be taken, rank is -inf and the id ``NO_ID`` from there on.
    """
    width = keys.rank.shape[1]
    if keys.marks is not None:
        keys = Keys(**{**keys.columns(), "rank": keys.rank.masked_fill(_duplicates(keys), -torch.inf)})
    positions = torch.arange(width, device=keys.ids.device)
    if keys.ties is None:
        if width > 2**22:
            raise ValueError(f"a chunk holds {width} candidates of one problem; at most {2**22} can be told apart: set a chunk_size")
        _, packed = topk(keys.rank, k, ids=keys.ids * width + positions)  # one number names the candidate and says where it stands
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
    """An int64 for each state behind the first ``axes`` axes; equal states have equal marks, others differ but for a chance of 2^-64."""
    flat = (states + 0.0).contiguous().flatten(axes)  # -0 becomes +0
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()])
    generator = torch.Generator().manual_seed(flat.shape[-1])
    weights = torch.randint(-(2**62), 2**62, flat.shape[-1:], generator=generator) * 2 + 1
    return (words.long() * weights.to(words.device)).sum(-1)


class TopPool:
    """The ``k`` best states of each of ``n`` groups, in ``k`` slots a group, and their keys in order.

    A survivor is (slot, id): a state that comes in among the best is copied into the slot of one that fell out, and no other state moves.
    Of B candidates in random order about ``k (1 + ln(B / k))`` are copied. The keys, and with them the result, do not depend on the
    order or the chunks in which candidates come.

    Args:
        state: one state ``[C, *S]``, for its shape, dtype and device.
        n, k: groups and slots of each.
        ties, marks: whether keys come with them.
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
            groups: the groups that the chunk is of, P of them.
            keys: of its candidates, ``[P, m]``.
            states: ``[R, b, C, *S]``.
            row, column: int64 ``[P, m]``, where in ``states`` each candidate's state stands.
        """
        if not bool((keys.rank.amax(1) >= self.keys.rank[groups, -1]).any()):
            return
        held, slots = self.keys.rows(groups), self._slots[groups]
        found, index = best(held.beside(keys), self.k)
        taken = found.rank > -torch.inf
        stays, comes = taken & (index < self.k), taken & (index >= self.k)
        at = torch.where(stays, index, 0)
        kept = torch.zeros_like(at).scatter_add_(1, at, stays.long())
        free = slots.gather(1, kept.argsort(dim=1, stable=True))  # the slots of those that fell out come first
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
        """Take over all keys ``[n, k]``, and the states ``[m, C, *S]`` of those at ``group``, ``place``."""
        self.keys, self._slots = keys, torch.arange(self.k, device=self._slots.device).expand_as(self._slots).clone()
        self.states[group, place] = states

    def replace(self, groups: Tensor, other: TopPool) -> None:
        """Take over the groups of ``other``, all of them, as ``groups``."""
        self.states[groups], self._slots[groups] = other.states, other._slots
        for name, value in other.keys.columns().items():
            getattr(self.keys, name)[groups] = value
        self.copies += other.copies

    @property
    def taken(self) -> Tensor:
        """Which places hold a survivor, bool ``[n, k]``, best first."""
        return self.keys.rank > -torch.inf

    def states_of(self, group: Tensor, place: Tensor) -> Tensor:
        """A copy of the states ``[m, C, *S]`` at the places, counted from the best, of the groups."""
        return self.states[group, self._slots[group, place]]


def _duplicates(keys: Keys) -> Tensor:
    """Which candidates have the mark of a better one, bool ``[n, m]``."""
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
