"""Resampling of a step's candidates by weight, in place of the best k."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttcfast.core.seeds import hash_seed

from .beams import Beams, StepSearch, Survivors

_SITE = 0x7061727469636C65  # names the stream of the resampling among those of a seed


class ParticleSearch(StepSearch):
    """Keeps two float64 numbers of every candidate of a step, 16 bytes, and draws k of each problem with weights
    ``exp(score / temperature)``.

    Args:
        beams, width, floor, history: as for ``StepSearch``.
        k: survivors of a problem.
        temperature: large ones make all candidates alike, small ones the best win.
        uniforms: float64 ``[P]`` in [0, 1), one for each problem of ``beams``.
        make: gives the states ``[R, C, *S]`` of candidates by rows of ``beams`` and positions, once more; None keeps every chunk instead.
    """

    def __init__(
        self,
        beams: Beams,
        k: int,
        width: int,
        *,
        floor: float | None,
        history: int,
        temperature: float,
        uniforms: Tensor,
        make: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> None:
        super().__init__(beams, 1, width, floor=floor, subtrees=False, history=history)
        self._k, self._temperature, self._uniforms = k, temperature, uniforms
        self._values = torch.full((len(beams), width), -torch.inf, dtype=torch.float64, device=self.first.device)
        self._scores = self._values.clone()
        self._source = torch.zeros_like(self.nonfinite)  # which search a row's candidates came from: 0 is this one
        self._searches: list[ParticleSearch] = [self]
        self._row = torch.arange(len(beams), device=self.first.device)  # and its row there
        self._make, self._chunks = make, []  # type: ignore[var-annotated]

    def add(self, rows: slice, start: int, states: Tensor, score: Tensor, value: Tensor, ties: Tensor | None, marks: Tensor | None) -> None:
        super().add(rows, start, states, score, value, ties, marks)
        self._values[rows, start : start + value.shape[1]] = value
        self._scores[rows, start : start + value.shape[1]] = score
        if self._make is None:
            self._chunks.append((rows, start, states))

    def replace(self, rows: Tensor, other: StepSearch) -> None:
        assert isinstance(other, ParticleSearch)
        taken = other._best() > self._best()[self._owner[rows].unique_consecutive()]
        super().replace(rows, other)
        theirs = other.rows_of(taken)
        ours = rows[theirs]
        self._values[ours], self._scores[ours] = other._values[theirs], other._scores[theirs]
        self._source[ours], self._row[ours] = len(self._searches), theirs
        self._searches.append(other)

    def survivors(self, min_spread: float) -> Survivors:
        reached = self._values if self._floor is None else self._values.masked_fill(self._scores < self._floor, -torch.inf)
        return self._resampled(reached, min_spread)

    def below_floor(self, min_spread: float) -> Survivors | None:
        return (
            None if self._floor is None else self._resampled(self._values.masked_fill(self._scores >= self._floor, -torch.inf), min_spread)
        )

    def _resampled(self, values: Tensor, min_spread: float) -> Survivors:
        parents, positions = [], []
        for problem, uniform in enumerate(self._uniforms.tolist()):
            rows = (self._owner == problem).nonzero().flatten()
            drawn = systematic(values[rows].flatten() / self._temperature, self._k, uniform)
            parents.append(rows[drawn // self._width])
            positions.append(drawn % self._width)
        parent, position = torch.cat(parents), torch.cat(positions)
        collapsed = self.spread.collapsed(min_spread)[parent]
        position = torch.where(collapsed, 0, position)
        state = self._states(parent, position)
        state[collapsed] = self.first[parent[collapsed]]
        score = torch.where(collapsed, self.spread.first[parent], self._scores[parent, position])
        return Survivors(state, parent, position, score, collapsed)

    def _states(self, parent: Tensor, position: Tensor) -> Tensor:
        out = self.first[parent].clone()
        for number, search in enumerate(self._searches):
            wanted = self._source[parent] == number
            if bool(wanted.any()):
                out[wanted] = search._own_states(self._row[parent[wanted]], position[wanted])
        return out

    def _own_states(self, rows: Tensor, position: Tensor) -> Tensor:
        if self._make is not None:
            return self._make(rows, position)
        out = self.first[rows].clone()
        for block, start, states in self._chunks:
            here = (rows >= block.start) & (rows < block.stop) & (position >= start) & (position < start + states.shape[1])
            out[here] = states[rows[here] - block.start, position[here] - start]
        return out


def systematic(log_weights: Tensor, k: int, uniform: float) -> Tensor:
    """Indices ``[k]`` drawn by systematic resampling, ascending: each occurs its share of k times, rounded up or down. None where every
    weight is 0.

    Args:
        log_weights: float64 ``[m]``; -inf is never drawn.
        uniform: in [0, 1): the one random number that it takes.

    Source: Kitagawa, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", 1996.
    """
    highest = log_weights.amax()
    if not bool(highest > -torch.inf):
        return torch.empty(0, dtype=torch.int64, device=log_weights.device)
    edges = (log_weights - highest).exp().cumsum(0)
    points = (torch.arange(k, dtype=torch.float64, device=edges.device) + uniform) / k * edges[-1]
    drawn = torch.searchsorted(edges, points, right=True)
    last = (log_weights > -torch.inf).nonzero()[-1, 0]  # rounding may put the last point on the last edge
    return drawn.minimum(last)


def uniforms_of(seed: int, step: int, problem_ids: Tensor) -> Tensor:
    """One number in [0, 1) for each problem, a function of seed, step and problem alone; float64 ``[P]``."""
    words = [hash_seed(seed, step, problem, _SITE) >> 10 for problem in problem_ids.tolist()]  # 53 bits
    return torch.tensor(words, dtype=torch.float64, device=problem_ids.device) / 2**53
