"""Keeps the best candidate of a single beam."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ttcfast.stochastic_sampling.row_axis import over
from ttcfast.ttc.guardrails import Spread
from ttcfast.ttc.paths import Survivors

from .keep import Chunk, Group, Keep, marked


class Argmax(Keep):
    """Keeps the scores of all candidates, the best candidate and candidate 0 of problems with one beam each.

    Ties go to the smaller position.
    """

    scores: Tensor

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.scores = self.first.new_full((len(self.beams), self._width), -torch.inf, dtype=torch.float64)
        self._best = torch.full_like(self.first, torch.nan)
        self._at = torch.full_like(self.nonfinite, self._width)  # position of the best, the smallest among equals

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        super().add(rows, start, chunk)
        states, scores = chunk.states, chunk.score
        top, at = scores.amax(1), scores.argmax(1)
        known = self.scores[rows].amax(1)
        better = (top > known) | ((top == known) & top.isfinite() & (at + start < self._at[rows]))
        picked = states[torch.arange(len(at), device=at.device), at]
        self._best[rows] = torch.where(over(better, picked), picked, self._best[rows])
        self._at[rows] = torch.where(better, at + start, self._at[rows])
        self.scores[rows, start : start + scores.shape[1]] = scores

    def missed(self) -> Tensor:
        return marked(self.without_candidate())

    def without_candidate(self) -> Tensor:
        """Whether there is no candidate that can be taken and reaches the floor, bool ``[M]`` on the device."""
        missed = ~self._usable
        return missed if self._score_floor is None else missed | (self.scores.amax(1) < self._score_floor)

    def without_score(self) -> Tensor:
        return marked(~self._usable & (self.unscored > 0))

    def survivors(self, min_spread: float, missed: Tensor) -> tuple[Survivors, Survivors | None]:
        every = self._choice(min_spread, Spread.of(self.scores, self._rounding))
        if not len(missed):
            return every, None
        going = torch.ones(len(every), dtype=torch.bool)
        going[missed] = False
        below = every.rows(missed[self._usable.cpu()[missed]])
        return every.rows(going.nonzero().flatten()), dataclasses.replace(below, collapsed=torch.zeros_like(below.collapsed))

    def _choice(self, min_spread: float, spread: Spread) -> Survivors:
        """One state for each problem: the best candidate, or candidate 0 where the scores do not tell them apart."""
        collapsed = spread.collapsed(min_spread) | spread.tied()
        state = torch.where(over(collapsed, self._best), self.first, self._best)
        return self._chosen(state, torch.where(collapsed, 0, self._at), collapsed)

    def _chosen(self, state: Tensor, position: Tensor, collapsed: Tensor, weights: Tensor | None = None) -> Survivors:
        score = self.scores.gather(1, position.clamp(0, self._width - 1).unsqueeze(1))[:, 0]
        return Survivors(state, torch.arange(len(position)), position, score, collapsed, weights, every=True)

    @property
    def _usable(self) -> Tensor:
        """Whether any candidate can be taken, bool ``[M]``."""
        return self.scores.isfinite().any(1)

    def _bettered(self, rows: Tensor, other: Keep) -> Tensor:
        assert other.scores is not None
        return marked(other.scores.amax(1) > self.scores[self._there(rows)].amax(1))

    def _take_over(self, ours: Tensor, other: Keep, theirs: Tensor) -> None:
        assert isinstance(other, Argmax)
        at, of = self._there(ours), self._there(theirs)
        self.scores[at], self._best[at], self._at[at] = other.scores[of], other._best[of], other._at[of]


class Mean(Argmax):
    """The mean of the usable candidates: a baseline that needs no reward."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._best.zero_()  # holds the running sum

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        Keep.add(self, rows, start, chunk)
        usable = chunk.score.isfinite()
        self._best[rows] += torch.where(over(usable, chunk.states), chunk.states, 0.0).sum(1)
        self.scores[rows, start : start + chunk.score.shape[1]] = chunk.score

    def _choice(self, min_spread: float, spread: Spread) -> Survivors:
        usable = self.scores.isfinite()
        count = usable.sum(1)
        weights = usable.double() / count.clamp_min(1).unsqueeze(1)
        state = self._best / over(count.clamp_min(1), self._best)
        return self._chosen(state, torch.full_like(count, -1), torch.zeros_like(count, dtype=torch.bool), weights)
