"""Combines several scorers into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .scorer import Project, ScoreContext, Scorer, as_scorer


class ScorerList(Scorer):
    """Weighted sum of scorers.

    Args:
        scorers: Scorers or callables (see ``as_scorer``), as a sequence or as a mapping from names.
        weights: One weight per scorer, as a sequence or a mapping with the same names; None means 1 each.
        zscore: Whether to standardise each scorer's scores over a problem's candidates, so that units do not matter. Scores that are equal
            up to rounding (``Scorer.spread_floor``) contribute 0. All candidates of a step must then be scored together.
        ndim: Number of space axes of the states.

    Raises:
        ValueError: There is no scorer, or the weights do not match.

    Source: docs/design/decisions.md ("Candidates for ARM").
    """

    def __init__(
        self,
        scorers: Sequence[Any] | Mapping[str, Any],
        weights: Sequence[float] | Mapping[str, float] | None = None,
        *,
        zscore: bool = False,
        ndim: int = 2,
    ) -> None:
        super().__init__()
        named = dict(scorers) if isinstance(scorers, Mapping) else _named(scorers)
        if not named:
            raise ValueError("scorers is empty; give at least one scorer")
        self.ndim, self.zscore = ndim, zscore
        self.scorers = nn.ModuleDict({name: as_scorer(s, ndim=ndim) for name, s in named.items()})
        self.weights = _weights(weights, list(named))
        self.needs_group = zscore or any(s.needs_group for s in self._terms().values())
        self.marks_nonfinite = any(s.marks_nonfinite for s in self._terms().values())

    @property
    def timeless(self) -> bool:
        return type(self) is ScorerList and all(scorer.timeless for scorer in self._terms().values())

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        total = None
        for name, scorer in self._terms().items():
            scores = scorer.score_group(state, candidates, context)
            part = self.weights[name] * (_zscore(scores, scorer.spread_floor(state, context)) if self.zscore else scores)
            total = part if total is None else total + part
        assert total is not None  # the constructor refuses an empty list
        return total

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """Takes one step along each reward in turn, each from where the previous one led, scaled by its weight over the largest weight.

        A single step along the sum would need one length for rewards of different units. Steps in turn do not, and what two rewards have in
        common is not applied twice.
        """
        moved, largest = candidates, max(self.weights.values())
        for name, scorer in self._terms().items():
            if self.weights[name] > 0:
                moved = moved + self.weights[name] / largest * scorer.ascent(state, moved, context)
        return moved - candidates

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """Returns the weighted sum of the known floors; None for z-scores, in which terms without spread are 0 already."""
        total = None
        for name, scorer in self._terms().items():
            floor = None if self.zscore else scorer.spread_floor(state, context)
            if floor is not None:
                total = abs(self.weights[name]) * floor + (0.0 if total is None else total)
        return total

    def of_projected(self, project: Project) -> Scorer:
        scorers = {name: scorer.of_projected(project) for name, scorer in self._terms().items()}
        return ScorerList(scorers, self.weights, zscore=self.zscore, ndim=self.ndim)

    def breakdown(self, x_t: Tensor, cand_tp1: Tensor, *, context: ScoreContext | None = None) -> dict[str, Tensor]:
        """Returns each scorer's own unweighted scores, in the layout of ``score``."""
        return {name: scorer.score(x_t, cand_tp1, context=context) for name, scorer in self._terms().items()}

    def _terms(self) -> dict[str, Scorer]:
        return {name: s for name, s in self.scorers.items() if isinstance(s, Scorer)}


def _named(scorers: Sequence[Any]) -> dict[str, Any]:
    """Names scorers by type, numbered if a type occurs more than once."""
    named: dict[str, Any] = {}
    for scorer in scorers:
        base = getattr(scorer, "__name__", type(scorer).__name__).replace(".", "_")
        name, count = base, 2
        while name in named:
            name, count = f"{base}_{count}", count + 1
        named[name] = scorer
    return named


def _weights(weights: Sequence[float] | Mapping[str, float] | None, names: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights are named {sorted(weights)} and scorers {sorted(names)}; give one weight for each scorer")
        return {name: float(weights[name]) for name in names}
    if len(weights) != len(names):
        raise ValueError(f"weights has {len(weights)} entries for {len(names)} scorers; give one for each")
    return dict(zip(names, map(float, weights)))


def _zscore(scores: Tensor, floor: Tensor | None = None) -> Tensor:
    """Standardises over each problem's finite candidates ``[N, B]``; 0 if they span at most ``floor [N]``. Other scores are kept."""
    finite = scores.isfinite()
    count = finite.sum(1, keepdim=True).clamp_min(1)
    kept = torch.where(finite, scores, 0.0)
    centred = torch.where(finite, scores - kept.sum(1, keepdim=True) / count, 0.0)
    spread = (centred.square().sum(1, keepdim=True) / count).sqrt()
    level = spread > 0 if floor is None else _range(scores, finite) > floor.unsqueeze(1)
    rounding = 8 * torch.finfo(scores.dtype).eps * kept.abs().amax(1, keepdim=True)  # equal scores must not become noise of size 1
    return torch.where(finite, torch.where((spread > rounding) & level, centred / spread, 0.0), scores)


def _range(scores: Tensor, finite: Tensor) -> Tensor:
    """Largest minus smallest finite score, float64 ``[N, 1]``; -inf if there is none."""
    highest = torch.where(finite, scores, -torch.inf).double().amax(1, keepdim=True)
    return highest - torch.where(finite, scores, torch.inf).double().amin(1, keepdim=True)
