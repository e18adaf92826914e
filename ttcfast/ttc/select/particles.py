"""Draws survivors by weight instead of keeping the best k."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ttcfast.core.seeds import hash_seed
from ttcfast.ttc.paths import Survivors

from .beams import BestOfBeams
from .keep import Chunk, Group, Keep
from .topk import TopPool

_SITE = 0x7061727469636C65  # the random stream of the resampling


class Particles(BestOfBeams):
    """Draws k candidates of each problem with weights ``exp(score / temperature)``. Experimental: no measurement shows a gain.

    Two float64 numbers of every candidate are kept, 16 bytes.

    Args:
        group: As for ``Keep``.
        k: Number of survivors of a problem.
        temperature: A large one makes all candidates alike; with a small one the best wins.
        uniforms: float64 ``[P]`` in [0, 1), one for each problem of ``beams``.
        make: Makes the states ``[R, C, *S]`` of candidates once more from rows of ``beams`` and positions; None keeps every chunk instead.
    """

    def __init__(
        self, group: Group, k: int, *, temperature: float, uniforms: Tensor, make: Callable[[Tensor, Tensor], Tensor] | None
    ) -> None:
        super().__init__(group, 1)
        self._k, self._temperature, self._uniforms = k, temperature, uniforms
        self._values = self._rounding.new_full((len(self.beams), self._width), -torch.inf)
        self._scores = self._values.clone()
        self._draws: list[Particles] = [self]  # this one, and those of groups drawn again
        self._draw = torch.zeros_like(self.nonfinite)  # the draw that a row's candidates come from
        self._row = torch.arange(len(self.beams), device=self.first.device)  # and its row there
        self._make = make
        self._chunks: list[tuple[slice, int, Tensor]] = []

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        super().add(rows, start, chunk)
        self._values[rows, start : start + chunk.value.shape[1]] = chunk.value
        self._scores[rows, start : start + chunk.score.shape[1]] = chunk.score
        if self._make is None:
            self._chunks.append((rows, start, chunk.states))

    def _take_over(self, ours: Tensor, other: Keep, theirs: Tensor) -> None:
        assert isinstance(other, Particles)
        super()._take_over(ours, other, theirs)
        self._values[ours], self._scores[ours] = other._values[theirs], other._scores[theirs]
        self._draw[ours], self._row[ours] = len(self._draws), theirs
        self._draws.append(other)

    def _survivors(self, pool: TopPool, min_spread: float) -> Survivors:
        values = self._values
        if self._score_floor is not None:
            reaches = self._scores >= self._score_floor
            values = values.masked_fill(~reaches if pool is self.pools[0] else reaches, -torch.inf)
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
        for number, draw in enumerate(self._draws):
            wanted = self._draw[parent] == number
            if bool(wanted.any()):
                out[wanted] = draw._own_states(self._row[parent[wanted]], position[wanted])
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
    """Draw ``k`` indices by systematic resampling, ascending: each occurs its share of k times, rounded up or down.

    Args:
        log_weights: float64 ``[m]``; -inf is never drawn.
        uniform: The one random number that is needed, in [0, 1).

    Returns:
        int64 ``[k]``, or ``[0]`` where every weight is 0.

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
    """One number in [0, 1) for each problem, float64 ``[P]``, a function of seed, step and problem alone."""
    words = [hash_seed(seed, step, problem, _SITE) >> 10 for problem in problem_ids.tolist()]  # 53 bits
    return torch.tensor(words, dtype=torch.float64, device=problem_ids.device) / 2**53
