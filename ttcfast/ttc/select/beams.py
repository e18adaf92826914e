"""One step of a search over several beams, in memory that does not grow with the number of candidates.

Candidates come in chunks: generated, scored, and forgotten but for those among the best so far (``TopPool``), candidate 0 of each beam,
and a few numbers of each beam's scores that the guardrails ask for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.ttc.guardrails import finite_states

from .topk import Keys, TopPool


@dataclass(frozen=True)
class Beams:
    """The states that a step leaves, one row each, those of a problem one after another.

    Attributes:
        window: ``[M, C, *S]``, or ``[M, h, C, *S]`` with history.
        problem: int64 ``[M]``, which of the rollout's problems, ascending.
        beam: int64 ``[M]``, which beam of its problem, from 0 on.
        offset: float64 ``[M]``, what a beam's past adds to the rank of its candidates; 0 for the best beam of a problem.
    """

    window: Tensor
    problem: Tensor
    beam: Tensor
    offset: Tensor

    def __len__(self) -> int:
        return len(self.problem)

    def rows(self, rows: Tensor) -> Beams:
        return Beams(self.window[rows], self.problem[rows], self.beam[rows], self.offset[rows])


@dataclass(frozen=True)
class Survivors:
    """What a step keeps, one row each, in order of (problem, rank).

    Attributes:
        state: ``[R, C, *S]``.
        parent: int64 ``[R]``, row of ``Beams`` that it comes from.
        position: int64 ``[R]``, of the candidate in its beam's group; -1 for a state that was no candidate.
        score: float64 ``[R]``, the step's own score, -inf for a state that has none.
        collapsed, fallback, frozen: bool ``[R]``, as in ``StepOutput``; a frozen one is dropped.
    """

    state: Tensor
    parent: Tensor
    position: Tensor
    score: Tensor
    collapsed: Tensor

    def __len__(self) -> int:
        return len(self.parent)

    def rows(self, rows: Tensor) -> Survivors:
        return Survivors(self.state[rows], self.parent[rows], self.position[rows], self.score[rows], self.collapsed[rows])


def joined(parts: list[Survivors], problem: Tensor) -> Survivors:
    """Several, in order of the problems ``problem [M]`` of their parents; equal ones as they come."""
    columns = {name: torch.cat([getattr(p, name) for p in parts]) for name in Survivors.__dataclass_fields__}
    together = Survivors(**columns)
    return together.rows(problem[together.parent].argsort(stable=True))


class Spread:
    """Of each row's scores: the largest, the smallest, the largest size, how many can be used, the largest but the first, the first, and
    the spread that rounding explains, -inf where that is not known.

    ``first`` is the score of a row's candidate 0 at this step, ``opening`` what it is ranked by, as all others are.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.highest = torch.full((rows,), -torch.inf, dtype=torch.float64, device=device)
        self.lowest, self.size = -self.highest, torch.zeros_like(self.highest)
        self.rest, self.opening, self.first, self.floor = (self.highest.clone() for _ in range(4))
        self.count = torch.zeros(rows, dtype=torch.int64, device=device)

    def add(self, rows: slice, start: int, scores: Tensor, first: Tensor) -> None:
        """Scores ``[m, b]``; ``first [m]`` is the score of the chunk's first candidate, to be kept where that is the group's."""
        usable = scores.isfinite()
        self.highest[rows] = self.highest[rows].maximum(scores.amax(1))
        self.lowest[rows] = self.lowest[rows].minimum(torch.where(usable, scores, torch.inf).amin(1))
        self.size[rows] = self.size[rows].maximum(torch.where(usable, scores.abs(), 0.0).amax(1))
        self.count[rows] += usable.sum(1)
        if start == 0:
            self.first[rows], self.opening[rows] = torch.where(usable[:, 0], first, -torch.inf), scores[:, 0]
        others = scores if start else scores[:, 1:]
        if others.shape[1]:
            self.rest[rows] = self.rest[rows].maximum(others.amax(1))

    def collapsed(self, least: float) -> Tensor:
        """As ``guardrails.spread_collapsed``, and only where the first candidate could be taken, bool ``[M]``."""
        flat = (self.count > 1) & (self.highest - self.lowest <= (least * self.size).maximum(self.floor))
        return flat & self.first.isfinite()

    def tied(self) -> Tensor:
        """As ``guardrails.tied_with_first``, bool ``[M]``."""
        return (self.opening - self.rest).abs() <= self.floor

    def like_first(self, rows: Tensor, values: Tensor) -> Tensor:
        """Of candidates ``[R]`` of such rows, by what they are ranked by: whether rounding alone tells them from a first one that none
        betters, bool."""
        return self.tied()[rows] & ((values - self.opening[rows]).abs() <= self.floor[rows])

    def replace(self, rows: Tensor, other: Spread) -> None:
        for name, value in vars(other).items():
            getattr(self, name)[rows] = value


class StepSearch:
    """Keeps, of the candidates of a step, the best k of each group of beams.

    Args:
        beams: what is left. A group is a problem's beams, or, for independent subtrees, one beam.
        k: survivors of a group.
        width: candidates of a beam, B times the copies that refinement makes.
        floor: scores below it are taken only where the problem has none above it and no fallback.
        subtrees: each beam is a group of its own.
        ties, marks: whether candidates come with a tie-breaker's value and with a mark that tells duplicates.
    """

    def __init__(
        self,
        beams: Beams,
        k: int,
        width: int,
        *,
        floor: float | None,
        subtrees: bool,
        history: int,
        ties: bool = False,
        marks: bool = False,
    ) -> None:
        latest = beams.window[:, -1] if history > 1 else beams.window
        self.beams, self._width, self._floor, self._subtrees = beams, width, floor, subtrees
        self._problems, self._owner = beams.problem.unique_consecutive(return_inverse=True)
        rows = torch.arange(len(beams), device=latest.device)
        self._group: Tensor = rows if subtrees else self._owner
        self._place: Tensor = torch.zeros_like(rows) if subtrees else beams.beam
        self._bounds = self._group.tolist()  # of rows, on the CPU: chunks are cut by it
        groups = self._bounds[-1] + 1
        self.pool = TopPool(latest[0], groups, k, ties=ties, marks=marks)
        self._below = None if floor is None else TopPool(latest[0], groups, k, ties=ties, marks=marks)
        self.spread = Spread(len(beams), latest.device)
        self.first = torch.full_like(latest, torch.nan)
        self.nonfinite = torch.zeros_like(rows)
        self.distinct = torch.ones_like(rows)  # candidates that differ, set by whoever draws them
        self.unscored = torch.zeros_like(rows)  # finite candidates of chunks without a finite score
        self.rewarded = 0  # evaluations of the reward, counted by whoever makes them

    def add(self, rows: slice, start: int, states: Tensor, score: Tensor, value: Tensor, ties: Tensor | None, marks: Tensor | None) -> None:
        """Take in a chunk.

        Args:
            rows: of ``beams``; start: position in their groups of the chunk's first candidate.
            states: ``[m, b, C, *S]``.
            score: float64 ``[m, b]``, of the step alone, -inf where a candidate cannot be used.
            value: float64 ``[m, b]``, what it is ranked by beside its beam's past: the score, or that of its continuation.
            ties, marks: ``[m, b]``, where they are used.
        """
        self.nonfinite[rows] += value.isinf().sum(1)
        if start == 0:
            self.first[rows] = states[:, 0]
        self.spread.add(rows, start, value, score[:, 0])
        position = torch.arange(start, start + value.shape[1], device=value.device)
        ids = self._place[rows].unsqueeze(1) * self._width + position
        keys = Keys(value + self.beams.offset[rows].unsqueeze(1), ids, score, ties, marks)
        groups, keys, row, column = self._grouped(rows, keys)
        for pool, wanted in ((self.pool, True), (self._below, False)):
            if pool is None:
                continue
            own = keys
            if self._floor is not None:
                reaches = keys.scores >= self._floor
                own = Keys(**{**keys.columns(), "rank": keys.rank.masked_fill(reaches != wanted, -torch.inf)})
            pool.add(groups, own, states, row, column)

    def _grouped(self, rows: slice, keys: Keys) -> tuple[slice, Keys, Tensor, Tensor]:
        """Keys ``[P, m]`` of the groups that the rows belong to, and where each stands in the chunk."""
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
        group, place = self._group[rows] - first, self._place[rows]
        places = int(place.max()) + 1

        def spread_out(values: Tensor, empty: float) -> Tensor:
            out = torch.full((count, places, b), empty, dtype=values.dtype, device=device)
            out[group, place] = values
            return out.flatten(1)

        empty = {"rank": -torch.inf, "ids": float(2**40)}
        columns = {name: spread_out(value, empty.get(name, 0.0)) for name, value in keys.columns().items()}
        return slice(first, last + 1), Keys(**columns), spread_out(row, 0.0), spread_out(column, 0.0)

    @property
    def pools(self) -> list[TopPool]:
        return [self.pool] if self._below is None else [self.pool, self._below]

    def missed(self) -> Tensor:
        """Problems ``[P]`` of which no candidate can be taken, or none reaches the floor, bool."""
        return ~self._any(self.pool.taken.any(1))

    def without_score(self) -> Tensor:
        """Rows of the problems that have finite candidates and no score."""
        finite = torch.zeros_like(self._problems).scatter_add_(0, self._owner, self.unscored)
        return self.rows_of((finite > 0) & (self._best() == -torch.inf))

    def rows_of(self, problems: Tensor) -> Tensor:
        """Rows of the problems that ``problems``, bool ``[P]``, marks."""
        return problems[self._owner].nonzero().flatten()

    def replace(self, rows: Tensor, other: StepSearch) -> None:
        """Take over from ``other`` (the problems of ``rows``, drawn again) those whose best candidate betters their own."""
        self.nonfinite[rows] += other.nonfinite
        self.unscored[rows] += other.unscored
        self.rewarded += other.rewarded
        problems = self._owner[rows].unique_consecutive()
        better = other._best() > self._best()[problems]  # of each problem drawn again
        theirs = other.rows_of(better)
        ours = rows[theirs]
        groups, from_groups = self._group[ours].unique_consecutive(), other._group[theirs].unique_consecutive()
        for pool, drawn in ((self.pool, other.pool), (self._below, other._below)):
            if pool is not None and drawn is not None:
                pool.replace(groups, _part(drawn, from_groups))
        self.spread.replace(ours, _rows_of_spread(other.spread, theirs))
        first = other.first[theirs]
        absent = first.isnan().flatten(1).all(1).reshape(-1, *[1] * (first.ndim - 1))  # the deterministic step is not drawn again
        self.first[ours] = torch.where(absent, self.first[ours], first)

    def survivors(self, min_spread: float) -> Survivors:
        """The best k of each group; candidate 0 of a beam in place of all of its survivors where its scores have collapsed, and in place of
        those that rounding alone tells from it where none betters it by more."""
        return self._survivors(self.pool, min_spread)

    def below_floor(self, min_spread: float) -> Survivors | None:
        """The same of the candidates below the floor; None without a floor."""
        return None if self._below is None else self._survivors(self._below, min_spread)

    def _survivors(self, pool: TopPool, min_spread: float) -> Survivors:
        group, place = pool.taken.nonzero(as_tuple=True)
        ids, score = pool.keys.ids[group, place], pool.keys.scores[group, place]
        position = ids % self._width
        parent = self._row_at()[group, ids // self._width]
        value = pool.keys.rank[group, place] - self.beams.offset[parent]
        collapsed = self.spread.collapsed(min_spread)[parent] | self.spread.like_first(parent, value)
        keep = ~collapsed | ~_seen_before(parent)  # candidate 0 is taken once: those like it are the best of their beam
        group, place, position, parent, score, collapsed = (v[keep] for v in (group, place, position, parent, score, collapsed))
        state = pool.states_of(group, place)
        state[collapsed] = self.first[parent[collapsed]]
        score = torch.where(collapsed, self.spread.first[parent], score)
        return Survivors(state, parent, torch.where(collapsed, 0, position), score, collapsed)

    def _row_at(self) -> Tensor:
        """Row of each (group, place), int64 ``[G, k]``."""
        at = self._group.new_zeros((self._bounds[-1] + 1, int(self._place.max()) + 1))
        at[self._group, self._place] = torch.arange(len(self._group), device=at.device)
        return at

    def _best(self) -> Tensor:
        """The best rank of each problem, above or below the floor, ``[P]``."""
        rank = self.pool.keys.rank[:, 0] if self._below is None else self.pool.keys.rank[:, 0].maximum(self._below.keys.rank[:, 0])
        per_row = rank[self._group]
        return per_row.new_full((len(self._problems),), -torch.inf).scatter_reduce_(0, self._owner, per_row, "amax")

    def _any(self, of_group: Tensor) -> Tensor:
        count = torch.zeros_like(self._problems).scatter_add_(0, self._owner, of_group[self._group].long())
        return count > 0


def usable_scores(scores: Tensor, candidates: Tensor, marked: bool) -> Tensor:
    """Scores in float64, -inf where they, or (unless the scorer ``marked`` them) the candidates, are not finite."""
    usable = scores.isfinite()
    if not marked:
        usable = usable & finite_states(candidates, 2)
    return torch.where(usable, scores.double(), -torch.inf)


def _seen_before(values: Tensor) -> Tensor:
    """Whether an entry of ``[m]`` equals one before it."""
    order = values.argsort(stable=True)
    again = torch.zeros_like(values, dtype=torch.bool)
    again[1:] = values[order][1:] == values[order][:-1]
    return torch.zeros_like(again).scatter_(0, order, again)


def _part(pool: TopPool, groups: Tensor) -> TopPool:
    part = TopPool.__new__(TopPool)
    part.k, part.copies = pool.k, pool.copies
    part.states, part._slots, part.keys = pool.states[groups], pool._slots[groups], pool.keys.rows(groups)
    return part


def _rows_of_spread(spread: Spread, rows: Tensor) -> Spread:
    part = Spread.__new__(Spread)
    for name, value in vars(spread).items():
        setattr(part, name, value[rows])
    return part
