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
        self._draw = torch.zeros(len(self.beams), dtype=torch.int64)  # on the host, the draw that a row's candidates come from
        self._row = torch.arange(len(self.beams))  # and its row there
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
        at, of = self._there(ours), self._there(theirs)
        self._values[at], self._scores[at] = other._values[of], other._scores[of]
        self._draw[ours], self._row[ours] = len(self._draws), theirs
        self._draws.append(other)

    def _survivors(self, pool: TopPool, min_spread: float) -> tuple[Survivors, int]:
        values = self._values
        if self._score_floor is not None:
            reaches = self._scores >= self._score_floor
            values = values.masked_fill(~reaches if pool is self.pools[0] else reaches, -torch.inf)
        table = values.new_full((*self._row_at.shape, self._width), -torch.inf)  # [P, most beams, B]
        table[self._owner_there, self._place_there] = values
        drawn = systematic(table.flatten(1) / self._temperature, self._k, self._uniforms)
        parent, position = self._row_at.gather(1, drawn // self._width).flatten(), (drawn % self._width).flatten()
        collapsed = self.spread.collapsed(min_spread)[parent]
        position = torch.where(collapsed, 0, position)
        usable = (table > -torch.inf).flatten(1).any(1).repeat_interleave(self._k)
        columns = torch.stack([usable.long(), parent, position, collapsed.long()])
        told = torch.cat([columns.flatten(), pool.copies.reshape(1)]).cpu()  # waits for the device
        kept, origin, place, fallen = told[:-1].view(4, -1)
        rows = kept.nonzero().flatten()
        if len(rows) < len(kept):
            at = self._there(rows)
            parent, position, collapsed = parent[at], position[at], collapsed[at]
        origin, place, first = origin[rows], place[rows], fallen[rows].nonzero().flatten()
        state = self._states(origin, place)
        if len(first):
            state[self._there(first)] = self.first[self._there(origin[first])]
        score = torch.where(collapsed, self.spread.first[parent], self._scores[parent, position])
        return Survivors(state, origin, position, score, collapsed), int(told[-1])

    def _states(self, parent: Tensor, position: Tensor) -> Tensor:
        """The states of candidates of these rows at these positions, both on the host."""
        out = self.first[self._there(parent)].clone()
        for number, draw in enumerate(self._draws):
            wanted = (self._draw[parent] == number).nonzero().flatten()
            if len(wanted):
                out[self._there(wanted)] = draw._own_states(self._row[parent[wanted]], position[wanted])
        return out

    def _own_states(self, rows: Tensor, position: Tensor) -> Tensor:
        if self._make is not None:
            return self._make(rows, position)
        out = self.first[self._there(rows)].clone()
        for block, start, states in self._chunks:
            here = (rows >= block.start) & (rows < block.stop) & (position >= start) & (position < start + states.shape[1])
            here = here.nonzero().flatten()
            out[self._there(here)] = states[self._there(rows[here] - block.start), self._there(position[here] - start)]
        return out


def systematic(log_weights: Tensor, k: int, uniforms: Tensor) -> Tensor:
    """Draw ``k`` indices of every row by systematic resampling, ascending: each occurs its share of k times, rounded up or down.

    Args:
        log_weights: float64 ``[P, m]``; -inf is never drawn unless all of a row are.
        uniforms: The one random number that each row needs, in [0, 1), float64 ``[P]``.

    Returns:
        int64 ``[P, k]``.

    Source: Kitagawa, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", 1996.
    """
    highest = log_weights.amax(1, keepdim=True)
    edges = (log_weights - torch.where(highest > -torch.inf, highest, 0.0)).exp().cumsum(1)
    points = (torch.arange(k, dtype=torch.float64, device=edges.device) + uniforms.unsqueeze(1)) / k * edges[:, -1:]
    drawn = torch.searchsorted(edges, points, right=True)
    number = torch.arange(log_weights.shape[1], device=edges.device)
    last = torch.where(log_weights > -torch.inf, number, 0).amax(1, keepdim=True)  # rounding may put the last point on the last edge
    return drawn.minimum(last)


def uniforms_of(seed: int, step: int, problem_ids: Tensor) -> Tensor:
    """One number in [0, 1) for each problem ``[P]``, float64, a function of seed, step and problem alone; all on the host."""
    words = [hash_seed(seed, step, problem, _SITE) >> 10 for problem in problem_ids.tolist()]  # 53 bits
    return torch.tensor(words, dtype=torch.float64) / 2**53
