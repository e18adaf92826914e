"""Keeps the best k candidates of several beams, in memory that does not grow with the number of candidates."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ttcfast.ops.ranking import Keys
from ttcfast.ttc.guardrails import Spread
from ttcfast.ttc.paths import Survivors

from .keep import Chunk, Group, Keep
from .topk import TopPool


class BestOfBeams(Keep):
    """Keeps the best k candidates of each problem (``TopPool``), candidate 0 of each beam, and the spread of its scores.

    Args:
        group: As for ``Keep``.
        k: Number of survivors of each problem.
        subtrees: Each beam keeps k survivors of its own.
        ties, marks: Whether candidates come with a tie-breaker's value and with a mark that identifies duplicates.
    """

    def __init__(self, group: Group, k: int, *, subtrees: bool = False, ties: bool = False, marks: bool = False) -> None:
        super().__init__(group)
        known = self.beams.known
        self._problems, self._owner = torch.unique_consecutive(known.problem, return_inverse=True)  # this and what follows on the host
        rows = torch.arange(len(known.problem))
        self._group: Tensor = rows if subtrees else self._owner
        self._place: Tensor = torch.zeros_like(rows) if subtrees else known.beam
        self._bounds: list[int] = self._group.tolist()  # of rows, where chunks are cut
        groups, places = self._bounds[-1] + 1, int(self._place.max()) + 1
        row_at = rows.new_zeros((groups, places))
        row_at[self._group, self._place] = rows
        columns = torch.stack([self._owner, self._group, self._place])
        self._owner_there, self._group_there, self._place_there = self._there(columns)
        self._row_at = self._there(row_at)
        # with a floor, the candidates that reach it and those below it
        self.pools = [TopPool(self.first[0], groups, k, ties=ties, marks=marks) for _ in range(1 + (self._score_floor is not None))]
        self.spread = Spread(self._rounding)

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        super().add(rows, start, chunk)
        self.spread.add(rows, start, chunk.value, chunk.score[:, 0])
        position = torch.arange(start, start + chunk.value.shape[1], device=chunk.value.device)
        ids = self._place_there[rows].unsqueeze(1) * self._width + position
        offset = self.beams.offset[rows].unsqueeze(1)
        groups, keys, row, column = self._grouped(rows, Keys(chunk.value + offset, ids, chunk.score, chunk.ties, chunk.marks))
        if self._score_floor is None:
            self.pools[0].add(groups, keys, chunk.states, row, column)
            return
        reaches = keys.scores >= self._score_floor
        self.pools[0].add(groups, keys.among(reaches), chunk.states, row, column)
        self.pools[1].add(groups, keys.among(~reaches), chunk.states, row, column)

    def _grouped(self, rows: slice, keys: Keys) -> tuple[slice, Keys, Tensor, Tensor]:
        """The groups that the rows belong to, their keys ``[P, m]``, and the row and column of each candidate in the chunk."""
        m, b = keys.rank.shape
        first, last = self._bounds[rows.start], self._bounds[rows.stop - 1]
        count, device = last - first + 1, keys.rank.device
        row = torch.arange(m, device=device).unsqueeze(1).expand(m, b)
        column = torch.arange(b, device=device).expand(m, b)
        if count == m:
            return slice(first, last + 1), keys, row, column
        if count == 1:
            flat = Keys(**{name: value.reshape(1, -1) for name, value in keys.columns().items()})
            return slice(first, last + 1), flat, row.reshape(1, -1), column.reshape(1, -1)
        group, place = self._group_there[rows] - first, self._place_there[rows]
        places = int(self._place[rows].max()) + 1

        def spread_out(values: Tensor, empty: float) -> Tensor:
            out = torch.full((count, places, b), empty, dtype=values.dtype, device=device)
            out[group, place] = values
            return out.flatten(1)

        empty = {"rank": -torch.inf, "ids": float(2**40)}
        columns = {name: spread_out(value, empty.get(name, 0.0)) for name, value in keys.columns().items()}
        return slice(first, last + 1), Keys(**columns), spread_out(row, 0.0), spread_out(column, 0.0)

    def missed(self) -> Tensor:
        per_row = self.pools[0].taken.any(1)[self._group_there].long()
        return self._rows_of(self._of_problems(per_row) == 0)

    def without_score(self) -> Tensor:
        return self._rows_of((self._of_problems(self.unscored) > 0) & (self._best() == -torch.inf))

    def survivors(self, min_spread: float, missed: Tensor) -> tuple[Survivors, Survivors | None]:
        """As ``Keep.survivors``. Candidate 0 of a beam replaces all of the beam's survivors where its scores have collapsed, and those that
        rounding alone separates from it where no candidate is better by more."""
        kept, self.copies = self._survivors(self.pools[0], min_spread)
        if not len(missed) or len(self.pools) == 1:
            return kept, None
        below, _ = self._survivors(self.pools[1], min_spread)
        problem = self.beams.known.problem
        below = below.rows(torch.isin(problem[below.parent], problem[missed]).nonzero().flatten())
        return kept, dataclasses.replace(below, collapsed=torch.zeros_like(below.collapsed))

    def _survivors(self, pool: TopPool, min_spread: float) -> tuple[Survivors, int]:
        """What goes on of a pool, and how many states it copied; reads from the device once."""
        taken, count = pool.taken.flatten(), pool.keys.ids.numel()
        number = torch.arange(count, device=taken.device)
        group, place = number // pool.k, number % pool.k
        ids, score = torch.where(taken, pool.keys.ids.flatten(), 0), pool.keys.scores.flatten()
        position, parent = ids % self._width, self._row_at[group, ids // self._width]
        value = pool.keys.rank.flatten() - self.beams.offset[parent]
        collapsed = taken & (self.spread.collapsed(min_spread)[parent] | self.spread.like_first(parent, value))
        seen = _seen_before(torch.where(taken, parent, len(self._group) + number))
        keep = taken & (~collapsed | ~seen)  # candidate 0 is taken once: those like it are the best of their beam
        columns = torch.stack([keep.long(), parent, collapsed.long()])
        told = torch.cat([columns.flatten(), pool.copies.reshape(1)]).cpu()  # waits for the device
        kept, origin, fallen = told[:-1].view(3, count)
        rows = kept.nonzero().flatten()
        if len(rows) < count:
            at = self._there(rows)
            group, place, position, parent, score, collapsed = (v[at] for v in (group, place, position, parent, score, collapsed))
        state, origin, first = pool.states_of(group, place), origin[rows], fallen[rows].nonzero().flatten()
        if len(first):
            state[self._there(first)] = self.first[self._there(origin[first])]
        score = torch.where(collapsed, self.spread.first[parent], score)
        return Survivors(state, origin, torch.where(collapsed, 0, position), score, collapsed), int(told[-1])

    def _of_problems(self, values: Tensor) -> Tensor:
        """Sums over the rows of each problem, ``[P]``, of int64 values ``[M]``."""
        return values.new_zeros(len(self._problems)).scatter_add_(0, self._owner_there, values)

    def _rows_of(self, problems: Tensor) -> Tensor:
        """Rows of the problems that ``problems``, bool ``[P]``, marks."""
        return problems.cpu()[self._owner].nonzero().flatten()

    def _best(self) -> Tensor:
        """The best rank of each problem, above or below the floor, ``[P]``."""
        rank = torch.stack([pool.keys.rank[:, 0] for pool in self.pools]).amax(0)[self._group_there]
        return rank.new_full((len(self._problems),), -torch.inf).scatter_reduce_(0, self._owner_there, rank, "amax")

    def _bettered(self, rows: Tensor, other: Keep) -> Tensor:
        assert isinstance(other, BestOfBeams)
        problems = self._there(torch.unique_consecutive(self._owner[rows]))
        return other._rows_of(other._best() > self._best()[problems])

    def _take_over(self, ours: Tensor, other: Keep, theirs: Tensor) -> None:
        assert isinstance(other, BestOfBeams)
        groups = self._there(torch.unique_consecutive(self._group[ours]))
        from_groups = self._there(torch.unique_consecutive(other._group[theirs]))
        for pool, drawn in zip(self.pools, other.pools):
            pool.replace(groups, drawn, from_groups)
        self.spread.replace(self._there(ours), other.spread, self._there(theirs))


def _seen_before(values: Tensor) -> Tensor:
    """Whether an entry of ``[m]`` equals an earlier one."""
    order = values.argsort(stable=True)
    again = torch.zeros_like(values, dtype=torch.bool)
    again[1:] = values[order][1:] == values[order][:-1]
    return torch.zeros_like(again).scatter_(0, order, again)
