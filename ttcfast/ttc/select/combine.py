"""Combines candidates: their mean weighted by score, or the best point of their span."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.spec import StateSpec
from ttcfast.stochastic_sampling.row_axis import over
from ttcfast.ttc.guardrails import Spread
from ttcfast.ttc.paths import Survivors
from ttcfast.ttc.projection import stays_physical

from .argmax import Argmax
from .keep import Chunk, Group, Keep, marked

SPAN_STEPS = 4  # along a reward that knows a direction but not the best state
RIDGE = 1e-6  # relative to the mean squared size of the candidates' deviations


class SoftmaxMean(Argmax):
    """The mean of the usable candidates, weighted by ``softmax(score / temperature)``. Experimental: no measurement shows a gain.

    Only the running sum is held.
    """

    def __init__(self, group: Group, temperature: float) -> None:
        super().__init__(group)
        self._temperature = temperature
        self._sum = torch.zeros_like(self.first)
        self._peak = torch.full_like(self._rounding, -torch.inf)
        self._mass = torch.zeros_like(self._peak)

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        super().add(rows, start, chunk)
        candidates, scores = chunk.states, chunk.score
        exponent = scores / self._temperature
        peak = torch.maximum(self._peak[rows], exponent.amax(1))
        kept = torch.where(peak.isfinite(), (self._peak[rows] - peak).exp(), 0.0)
        usable = scores.isfinite()
        weights = torch.where(usable, (exponent - peak.unsqueeze(1)).exp(), 0.0)
        finite = torch.where(over(usable, candidates), candidates, 0.0)
        fresh = (over(weights, finite).to(finite.dtype) * finite).sum(1)
        self._sum[rows] = over(kept, fresh).to(fresh.dtype) * self._sum[rows] + fresh
        self._mass[rows] = kept * self._mass[rows] + weights.sum(1)
        self._peak[rows] = peak

    def _take_over(self, ours: Tensor, other: Keep, theirs: Tensor) -> None:
        assert isinstance(other, SoftmaxMean)
        super()._take_over(ours, other, theirs)
        at, of = self._there(ours), self._there(theirs)
        self._sum[at], self._peak[at], self._mass[at] = other._sum[of], other._peak[of], other._mass[of]

    def _choice(self, min_spread: float, spread: Spread) -> Survivors:
        collapsed = spread.collapsed(min_spread)
        mean = self._sum / over(self._mass, self._sum).to(self._sum.dtype)
        weights = torch.where(self.scores.isfinite(), (self.scores / self._temperature - self._peak.unsqueeze(1)).exp(), 0.0)
        weights = weights / self._mass.unsqueeze(1)
        one = torch.eye(1, self._width, dtype=weights.dtype, device=weights.device)
        weights = torch.where(collapsed.unsqueeze(1), one, torch.where(weights.isfinite(), weights, 0.0))
        return self._chosen(torch.where(over(collapsed, mean), self.first, mean), torch.where(collapsed, 0, -1), collapsed, weights)


class Span(Argmax):
    """The best point of ``c_0 + sum_i w_i (c_i - c_0)`` by a differentiable reward. Experimental: no measurement shows a gain.

    All candidates are held. Where a full step of the reward's ascent leads to the state that it takes for the best
    (``Scorer.ascent_to_best``), ``w`` is the least-squares approach to that state with a small ridge. Otherwise ``SPAN_STEPS`` steps are
    made up the reward, each the better of two lengths. Both stay within the trust region. The combination is taken where it scores higher
    than every candidate and keeps density and pressure positive, else the best candidate. c_0 is candidate 0, or the best one where
    candidate 0 is not usable.

    Args:
        group: As for ``Keep``.
        scorer: Differentiable reward that scores each candidate by itself.
        context: Step, time and problems of the states being left.
        trust: Largest distance from candidate 0 relative to the size of its own step; None for no limit.
        spec: Layout by which density and pressure are found; None requires finite values only.

    Source: docs/design/decisions.md ("Combining candidates").
    """

    def __init__(self, group: Group, scorer: Scorer, context: ScoreContext, trust: float | None, spec: StateSpec | None) -> None:
        super().__init__(group)
        self._scorer, self._context, self._trust, self._spec = scorer, context, trust, spec
        self._candidates = self.first.new_zeros((len(self.beams), self._width, *self.first.shape[1:]))

    def add(self, rows: slice, start: int, chunk: Chunk) -> None:
        super().add(rows, start, chunk)
        self._candidates[rows, start : start + chunk.states.shape[1]] = chunk.states

    def _take_over(self, ours: Tensor, other: Keep, theirs: Tensor) -> None:
        assert isinstance(other, Span)
        super()._take_over(ours, other, theirs)
        self._candidates[self._there(ours)] = other._candidates[self._there(theirs)]

    def _choice(self, min_spread: float, spread: Spread) -> Survivors:
        best = super()._choice(min_spread, spread)
        free = marked(~spread.collapsed(min_spread) & self._usable)
        state, position = best.state, best.position
        weights = torch.zeros_like(self.scores).scatter_(1, position.clamp(0, self._width - 1).unsqueeze(1), 1.0)
        if len(free):
            at = self._there(free)
            combined, score, coefficients = self._combine(free)
            taken = score > self.scores[at].amax(1)
            state[at] = torch.where(over(taken, combined), combined, state[at])
            position[at] = torch.where(taken, -1, position[at])
            weights[at] = torch.where(taken.unsqueeze(1), coefficients, weights[at])
        return self._chosen(state, position, best.collapsed & (position >= 0), weights)

    def _combine(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best combination of these problems: states ``[m, C, *S]``, scores ``[m]`` (-inf where unusable), coefficients ``[m, B]``."""
        scorer, at, beams = self._scorer, self._there(rows), self.beams.rows(rows)
        x, context = beams.latest, replace(self._context, problem_ids=beams.problem_ids, known=beams.known.problem_ids)
        span = _Deviations(x, self._candidates[at], self.scores[at], scorer, context)
        w = torch.zeros_like(self.scores[at])
        state, top, coefficients = span.at(w), torch.full_like(w[:, 0], -torch.inf), w
        for _ in range(1 if scorer.ascent_to_best else SPAN_STEPS):
            near = span.towards(scorer.ascent(x, span.at(w).unsqueeze(1), context))
            moves = [near] if scorer.ascent_to_best else [near, span.lengthened(near)]
            tried = [span.within(w + move, self._trust) for move in moves]
            reached = torch.stack([span.at(t) for t in tried], 1)
            scores = scorer.score_group(x, reached, context).double()
            scores = torch.where(stays_physical(span.base.unsqueeze(1), reached, self._spec, context), scores, -torch.inf)
            self.reward_evaluations += (1 + len(tried)) * len(rows)
            best, at = scores.max(1)
            every = torch.arange(len(rows), device=at.device)
            w, better = torch.stack(tried, 1)[every, at], best > top
            state = torch.where(over(better, state), reached[every, at], state)
            top, coefficients = torch.where(better, best, top), torch.where(better.unsqueeze(1), w, coefficients)
        return state, top, span.shares(coefficients)


class _Deviations:
    """The deviations ``c_i - c_0`` of m problems as the scorer sees them, in its units, with their Gram matrix in float64."""

    def __init__(self, x: Tensor, candidates: Tensor, scores: Tensor, scorer: Scorer, context: ScoreContext) -> None:
        usable = scores.isfinite()
        self._base_at = torch.where(usable[:, 0], 0, scores.argmax(1))
        every = torch.arange(len(x), device=x.device)
        raw = candidates[every, self._base_at]
        seen = scorer.seen(x, torch.where(over(usable, candidates), candidates, raw.unsqueeze(1)), context)
        self.base = seen[every, self._base_at]
        self._raw = seen - self.base.unsqueeze(1)  # [m, B, C, *S]
        self._units = scorer.units(x)
        self._reach = self._flat(self.base.unsqueeze(1) - x.unsqueeze(1)).square().sum(2).sqrt()[:, 0]
        scaled = self._raw / self._units
        self._scaled = scaled.flatten(2)
        self._gram = torch.stack([d @ d.T for d in map(Tensor.double, self._scaled)])
        size = self._gram.diagonal(dim1=1, dim2=2).mean(1)
        ridge = torch.where(size > 0, RIDGE * size, 1.0)
        self._regular = self._gram + ridge.reshape(-1, 1, 1) * torch.eye(scores.shape[1], dtype=ridge.dtype, device=ridge.device)

    def at(self, w: Tensor) -> Tensor:
        """``c_0 + sum_i w_i (c_i - c_0)``, ``[m, C, *S]``."""
        return self.base + (over(w.to(self._raw.dtype), self._raw) * self._raw).sum(1)

    def towards(self, move: Tensor) -> Tensor:
        """Coefficients ``[m, B]`` of the point of the span nearest to ``move [m, 1, C, *S]``."""
        self._wanted = self._flat(move)[:, 0]
        moments = torch.stack([d.double() @ m for d, m in zip(self._scaled, self._wanted)])
        coefficients: Tensor = torch.linalg.solve_ex(self._regular, moments).result  # regular by its ridge; a check waits for the device
        return coefficients

    def lengthened(self, w: Tensor) -> Tensor:
        """``w`` from ``towards``, lengthened so that to first order it gains what the move would have gained.

        Only a part of the gradient lies in the span. The result is too long where the maximum does not lie there.
        """
        inside = self._size(w)
        return w * torch.where(inside > 0, self._wanted.square().sum(1) / inside.square(), 0.0).unsqueeze(1)

    def within(self, w: Tensor, trust: float | None) -> Tensor:
        """``w``, shortened to the trust region."""
        if trust is None:
            return w
        size, reach = self._size(w), trust * self._reach
        return w * torch.where(size > reach, reach / size, 1.0).unsqueeze(1)

    def shares(self, w: Tensor) -> Tensor:
        """Weights of the candidates themselves; they add up to 1."""
        shares = w.clone()
        shares[torch.arange(len(w), device=w.device), self._base_at] = 0.0
        shares[torch.arange(len(w), device=w.device), self._base_at] = 1.0 - shares.sum(1)
        return shares

    def _size(self, w: Tensor) -> Tensor:
        return torch.einsum("ni,nij,nj->n", w, self._gram, w).clamp_min(0.0).sqrt()

    def _flat(self, change: Tensor) -> Tensor:
        return (change / self._units).flatten(2).double()
