"""Keeps the best k of a stream of scored states; only states among the best so far are copied."""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast.ops.ranking import Keys, best
from ttcfast.stochastic_sampling.row_axis import over


class TopPool:
    """The ``k`` best states of each of ``n`` groups, in ``k`` slots per group, and their keys in order.

    A state that enters the best is copied into the slot of one that left them, and no other state moves, so that about
    ``k (1 + ln(B / k))`` of B candidates in random order are copied. Neither keys nor result depend on the order or the chunks in which
    candidates come. Nothing waits for a GPU, where a chunk therefore writes all slots of its groups, most of them what they hold.

    Args:
        state: One state ``[C, *S]``, for its shape, dtype and device.
        n, k: Number of groups, and of slots in each.
        ties, marks: Whether keys come with these columns.

    Attributes:
        copies: Number of states copied, int64 ``[]`` on the device.
    """

    def __init__(self, state: Tensor, n: int, k: int, *, ties: bool = False, marks: bool = False) -> None:
        self.k, self.copies = k, torch.zeros((), dtype=torch.int64, device=state.device)
        self.states = state.new_empty((n, k, *state.shape))
        self.keys = Keys.empty(n, k, torch.float64, state.device, ties=ties, marks=marks)
        self._slots = torch.arange(k, device=state.device).expand(n, k).clone()

    def add(self, groups: slice, keys: Keys, states: Tensor, row: Tensor, column: Tensor) -> None:
        """Take in a chunk.

        Args:
            groups: The P groups that the chunk belongs to.
            keys: Keys of its candidates, ``[P, m]``.
            states: ``[R, b, C, *S]``.
            row, column: int64 ``[P, m]``, index of each candidate's state in ``states``.
        """
        if not states.is_cuda and not bool((keys.rank.amax(1) >= self.keys.rank[groups, -1]).any()):
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
        self._write(groups, new_slots, comes, states, row, column, (index - self.k).clamp_min(0))
        self.copies += comes.sum()
        self._slots[groups] = new_slots
        for name, value in found.columns().items():
            getattr(self.keys, name)[groups] = value

    def _write(self, groups: slice, slots: Tensor, comes: Tensor, states: Tensor, row: Tensor, column: Tensor, source: Tensor) -> None:
        """Copy the states of those that come, by number ``source`` in the chunk, into their slots, all ``[P, k]``."""
        if not states.is_cuda:
            group, place = comes.nonzero(as_tuple=True)
            chosen = source[group, place]
            self.states[groups][group, slots[group, place]] = states[row[group, chosen], column[group, chosen]]
            return
        place = slots.argsort(1)  # by slot: each slot has one place
        comes, source = comes.gather(1, place), source.gather(1, place)
        fresh = states[row.gather(1, source), column.gather(1, source)]
        self.states[groups] = torch.where(over(comes, fresh), fresh, self.states[groups])

    def fill(self, keys: Keys, states: Tensor) -> None:
        """Replace all keys ``[n, k]`` and states ``[n, k, C, *S]``."""
        self.keys, self.states = keys, states
        self._slots = torch.arange(self.k, device=self._slots.device).expand_as(self._slots).clone()

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
