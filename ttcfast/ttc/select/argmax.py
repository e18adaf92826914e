"""From the candidates of a step, chunk by chunk, to one next state; no more of them is kept than the choice needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.ttc.guardrails import spread_collapsed, tied_with_first


class Choice(NamedTuple):
    """What a group of candidates became.

    Attributes:
        state: ``[n, C, *S]``.
        position: int64 ``[n]``, of the chosen candidate; -1 for a combination.
        collapsed: bool ``[n]``, the scores hardly differed, so that candidate 0 was taken.
        weights: float64 ``[n, B]``, the share of every candidate in the state; None where one candidate is always chosen.
    """

    state: Tensor
    position: Tensor
    collapsed: Tensor
    weights: Tensor | None = None


class Argmax:
    """Keeps all scores, the best candidate and candidate 0. Ties go to the smaller position.

    Args:
        state: the states being left, ``[n, C, *S]``.
        width: candidates of each, B times the copies that refinement makes of one.
    """

    def __init__(self, state: Tensor, width: int) -> None:
        n = state.shape[0]
        self.scores = state.new_full((n, width), -torch.inf, dtype=torch.float64)
        self.nonfinite = torch.zeros(n, dtype=torch.int64, device=state.device)
        self.distinct = torch.ones_like(self.nonfinite)  # candidates that differ, set by whoever draws them
        self.unscored = torch.zeros_like(self.nonfinite)  # finite candidates of chunks without a finite score
        self.first = torch.full_like(state, torch.nan)
        self.floor: Tensor | None = None  # [n], spread of the scores that rounding explains
        self.reward_evaluations = 0  # beyond those of the candidates' own scores
        self._best = torch.full_like(state, torch.nan)
        self._at = torch.full_like(self.nonfinite, width)  # position of the best, among equals the smallest

    def add(self, rows: slice, start: int, candidates: Tensor, scores: Tensor) -> None:
        """Take in candidates ``[m, b, C, *S]`` at positions ``start`` on, with scores ``[m, b]`` that are -inf where not usable."""
        self.nonfinite[rows] += scores.isinf().sum(1)
        if start == 0:
            self.first[rows] = candidates[:, 0]
        top, at = scores.amax(1), scores.argmax(1)
        known = self.scores[rows].amax(1)
        better = (top > known) | ((top == known) & top.isfinite() & (at + start < self._at[rows]))
        picked = candidates[torch.arange(len(at), device=at.device), at]
        self._best[rows] = torch.where(over(better, picked), picked, self._best[rows])
        self._at[rows] = torch.where(better, at + start, self._at[rows])
        self.scores[rows, start : start + scores.shape[1]] = scores

    def replace(self, rows: Tensor, other: Argmax) -> None:
        """Take over the groups of ``other`` (drawn again) for those problems of ``rows`` whose best candidate they better; rejected
        candidates add up."""
        self.nonfinite[rows] += other.nonfinite
        self.unscored[rows] += other.unscored
        rows, better = self._bettered(rows, other)
        self.scores[rows], self._best[rows], self._at[rows] = other.scores[better], other._best[better], other._at[better]
        first = other.first[better]
        absent = first.isnan().flatten(1).all(1)  # the deterministic step is not drawn again
        self.first[rows] = torch.where(over(absent, first), self.first[rows], first)

    def _bettered(self, rows: Tensor, other: Argmax) -> tuple[Tensor, Tensor]:
        """Which of ``rows`` have a better candidate in ``other``, and a bool of where those stand in it."""
        better = other.scores.amax(1) > self.scores[rows].amax(1)
        return rows[better], better

    @property
    def usable(self) -> Tensor:
        """Whether any candidate can be taken, bool ``[n]``."""
        return self.scores.isfinite().any(1)

    def missed(self, floor: float | None) -> Tensor:
        """Whether no candidate is usable or, with a floor, none reaches it, bool ``[n]``."""
        return ~self.usable if floor is None else ~self.usable | (self.scores.amax(1) < floor)

    def flat(self, min_spread: float) -> Tensor:
        """Whether candidate 0 is usable and the scores' relative spread at most ``min_spread``, or their spread ``floor``; ``[n]``."""
        return spread_collapsed(self.scores, min_spread, self.floor) & self.scores[:, 0].isfinite()

    def choice(self, min_spread: float) -> Choice:
        """One state per problem: the best candidate, or candidate 0 where all scores are alike (``flat``), or the best is within ``floor``
        of candidate 0's."""
        collapsed = self.flat(min_spread) | tied_with_first(self.scores, self.floor)
        position = torch.where(collapsed, 0, self._at)
        return Choice(torch.where(over(collapsed, self._best), self.first, self._best), position, collapsed)


class Mean(Argmax):
    """The mean of the usable candidates: a baseline that no reward is needed for."""

    def __init__(self, state: Tensor, width: int) -> None:
        super().__init__(state, width)
        self._best.zero_()  # holds the running sum

    def add(self, rows: slice, start: int, candidates: Tensor, scores: Tensor) -> None:
        self.nonfinite[rows] += scores.isinf().sum(1)
        if start == 0:
            self.first[rows] = candidates[:, 0]
        usable = scores.isfinite()
        self._best[rows] += torch.where(over(usable, candidates), candidates, 0.0).sum(1)
        self.scores[rows, start : start + scores.shape[1]] = scores

    def choice(self, min_spread: float) -> Choice:
        usable = self.scores.isfinite()
        count = usable.sum(1)
        weights = usable.double() / count.clamp_min(1).unsqueeze(1)
        state = self._best / over(count.clamp_min(1), self._best)
        return Choice(state, torch.full_like(count, -1), torch.zeros_like(count, dtype=torch.bool), weights)


def over(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with axes of size 1 added, to broadcast over ``like``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
