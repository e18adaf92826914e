"""Defines the interface of all selections of candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.stochastic_sampling.row_axis import over
from ttcfast.transfer import sent
from ttcfast.ttc.paths import Beams, Survivors


class Chunk(NamedTuple):
    """Some candidates of some beams, and what decides over them.

    Attributes:
        states: ``[m, b, C, *S]``.
        score: float64 ``[m, b]``, score of this step alone; -inf where a candidate cannot be used.
        value: float64 ``[m, b]``, value that ranks a candidate within its beam: its score, or that of its continuation.
        ties: float64 ``[m, b]``, breaks ties, the larger first; None where the smaller position wins.
        marks: int64 ``[m, b]``, equal for equal states; None where duplicates do not matter.
    """

    states: Tensor
    score: Tensor
    value: Tensor
    ties: Tensor | None = None
    marks: Tensor | None = None

    def part(self, columns: slice) -> Chunk:
        return Chunk(*(None if value is None else value[:, columns] for value in self))  # type: ignore[arg-type]

    def last_usable(self, b: int) -> Chunk:
        """The last usable copy of each of ``b`` candidates, of a chunk that holds copies of them in blocks."""
        (states, *later), (score, *scores) = self.states.split(b, 1), self.score.split(b, 1)
        for copy, own in zip(later, scores):
            usable = own.isfinite()
            states, score = torch.where(over(usable, copy), copy, states), torch.where(usable, own, score)
        return Chunk(states, score, score)


class Group(NamedTuple):
    """What the candidates of a step are compared by.

    Attributes:
        beams: The states being left.
        width: Number of candidates of each beam, refined copies included.
        rounding: float64 ``[M]``, spread of scores that rounding explains; -inf where it is not known.
        score_floor: Scores below it are taken only where a problem has no other candidate and no finite fallback; None for no floor.
    """

    beams: Beams
    width: int
    rounding: Tensor
    score_floor: float | None


class Keep:
    """Takes the candidates of a step chunk by chunk and keeps no more of them than the choice needs.

    Rows that a method takes or returns are int64 ``[R]`` on the host. To return some it reads from the device, once.

    Attributes:
        scores: float64 ``[M, B]``, the scores of all candidates, where they are kept.
        first: ``[M, C, *S]``, candidate 0 of each beam, NaN until it comes by.
        nonfinite: int64 ``[M]``, number of candidates that cannot be used.
        unscored: int64 ``[M]``, number of finite candidates in chunks without a finite score.
        distinct: int64 ``[M]``, number of candidates that differ, set by the caller.
        reward_evaluations: Evaluations of the reward, most of them counted by the caller.
        solver_steps: Steps of classical solvers, counted by the caller.
        copies: Number of states copied.
    """

    scores: Tensor | None = None

    def __init__(self, group: Group) -> None:
        self.beams, self._width, self._rounding, self._score_floor = group
        self.first = torch.full_like(self.beams.latest, torch.nan)
        self.nonfinite = torch.zeros_like(self.beams.problem)
        self.unscored, self.distinct = torch.zeros_like(self.nonfinite), torch.ones_like(self.nonfinite)
        self.reward_evaluations = self.solver_steps = self.copies = 0

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        """Take in the candidates of the beams ``rows`` from position ``start``."""
        self.nonfinite[rows] += chunk.value.isinf().sum(1)
        if start == 0:
            self.first[rows] = chunk.states[:, 0]

    def missed(self) -> Tensor:
        """Rows of the problems without a candidate that can be taken and reaches the floor."""
        raise NotImplementedError

    def without_score(self) -> Tensor:
        """Rows of the problems that have finite candidates but no usable one."""
        raise NotImplementedError

    def replace(self, rows: Tensor, other: Keep) -> None:
        """Take over from ``other``, which drew the problems of ``rows`` again, those whose best candidate is better there."""
        at = self._there(rows)
        self.nonfinite[at] += other.nonfinite
        self.unscored[at] += other.unscored
        self.reward_evaluations += other.reward_evaluations
        self.solver_steps += other.solver_steps
        theirs = self._bettered(rows, other)
        ours = rows[theirs]
        at, first = self._there(ours), other.first[self._there(theirs)]
        absent = first.isnan().flatten(1).all(1)  # the deterministic step is not drawn again
        self.first[at] = torch.where(over(absent, first), self.first[at], first)
        self._take_over(ours, other, theirs)

    def survivors(self, min_spread: float, missed: Tensor) -> tuple[Survivors, Survivors | None]:
        """What goes on.

        Args:
            min_spread: Relative spread of scores up to which candidate 0 is taken.
            missed: The answer of ``missed()``.

        Returns:
            The states kept of all other problems, and the best below the floor of those of ``missed``; None where there are none.
        """
        raise NotImplementedError

    def _there(self, rows: Tensor) -> Tensor:
        """Rows on the device of the states."""
        return sent(rows, self.first.device)

    def _bettered(self, rows: Tensor, other: Keep) -> Tensor:
        """Rows of ``other`` whose problems have a better best candidate there."""
        raise NotImplementedError

    def _take_over(self, ours: Tensor, other: Keep, theirs: Tensor) -> None:
        """Take over the rows ``theirs`` of ``other`` as ``ours``."""
        raise NotImplementedError


def marked(flags: Tensor) -> Tensor:
    """The numbers of the flags that are set, on the host; waits for the device."""
    return flags.cpu().nonzero().flatten()
