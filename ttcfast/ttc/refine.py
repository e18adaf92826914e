"""Moves copies of candidates along a differentiable reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.rewards.ascent import channel_spread
from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.states.symmetry import Frames
from ttcfast.stochastic_sampling.row_axis import over

from .guardrails import finite_states
from .projection import stays_physical


def refine(
    state: Tensor,
    candidates: Tensor,
    scorer: Scorer,
    context: ScoreContext | None,
    *,
    steps: int,
    lengths: Sequence[float],
    trust: float | None = None,
    spec: StateSpec | None = None,
) -> Tensor:
    """Return the candidates and copies of them moved along the reward.

    A step moves each candidate by every length times ``scorer.ascent``. All copies stay in the group; with several steps the copy that
    scores best, or the only one, is moved on. A copy that is not finite, or has lost a positive density or pressure, becomes NaN, so that
    it cannot be chosen.

    Args:
        state: States being left, ``[N, C, *S]``.
        candidates: ``[N, B, C, *S]``.
        scorer: Reward to climb; also picks the best copy between steps.
        context: Context for the scorer.
        steps: Number of moves; 0 returns the candidates.
        lengths: Lengths of each move; 1 is a full step, see ``Scorer.ascent``.
        trust: Largest distance of a copy from its candidate relative to the size of the candidate's own step (candidate - state), both in
            units of the state's spread per channel; None for no limit.
        spec: Layout by which density and pressure are found; None requires finite copies only.

    Returns:
        ``[N, B * copies(steps, lengths), C, *S]``: the candidates, then a block of B for every step and length, so that position p holds a
        copy of candidate p % B.

    Raises:
        ValueError: The reward cannot be climbed (see ``Scorer.ascent``), or its move has another shape than the candidates.

    Source: docs/design/decisions.md ("Refinement").
    """
    if steps == 0:
        return candidates
    return torch.cat(_climb(state, candidates, scorer, context, steps, lengths, trust, spec)[0], 1)


@dataclass(frozen=True)
class Refined:
    """A group after ``refine``.

    Attributes:
        candidates: ``[N, M, C, *S]``, see ``refine``.
        scores: ``[N, M]``, as the scorer returns them; for a mean, which takes all alike, 0 or -inf.
        evaluations: Evaluations of the reward for each candidate of the group before.
    """

    candidates: Tensor
    scores: Tensor
    evaluations: int


def refine_and_score(
    state: Tensor,
    candidates: Tensor,
    scorer: Scorer,
    context: ScoreContext | None,
    cfg: TTCConfig,
    spec: StateSpec | None,
    frames: Frames | None = None,
) -> Refined:
    """Refine a group as ``cfg`` says and score all members; what an ascent has scored on its way is not scored again.

    With ``frames`` each candidate is moved, and its copies scored, under the symmetry under which it was computed: a reward that has
    learned from states of one orientation errs in another way in each.

    Raises:
        ValueError: The scorer does not return one score per candidate; otherwise as ``refine``.
    """
    if cfg.select == "mean" and not cfg.refine_steps:
        return Refined(candidates, _usable(candidates), 0)
    if frames is not None and cfg.refine_steps:
        return _refined_in_frames(state, candidates, scorer, context, cfg, spec, frames)
    if cfg.refine_steps == 0:
        return Refined(candidates, scored(state, candidates, scorer, context), 1)
    blocks, scores, evaluations = _climb(state, candidates, scorer, context, cfg.refine_steps, cfg.refine_lengths, cfg.trust, spec)
    group = torch.cat(blocks, 1)
    if cfg.select == "mean":
        return Refined(group, _usable(group), evaluations)
    if scorer.needs_group:
        return Refined(group, scored(state, group, scorer, context), evaluations + len(blocks))
    unknown = [i for i, known in enumerate(scores) if known is None]
    if unknown:
        found = scored(state, group if len(unknown) == len(blocks) else torch.cat([blocks[i] for i in unknown], 1), scorer, context)
        for i, part in zip(unknown, found.chunk(len(unknown), 1)):
            scores[i] = part
    return Refined(group, torch.cat([part for part in scores if part is not None], 1), evaluations + len(unknown))


def _usable(group: Tensor) -> Tensor:
    """Scores ``[N, M]`` that tell finite members from others, all that their mean asks."""
    return torch.where(finite_states(group, 2), 0.0, -torch.inf)


def _refined_in_frames(
    state: Tensor, candidates: Tensor, scorer: Scorer, context: ScoreContext | None, cfg: TTCConfig, spec: StateSpec | None, frames: Frames
) -> Refined:
    n, b = candidates.shape[:2]
    seen = frames.into(state.unsqueeze(1).expand_as(candidates)).flatten(0, 1)
    where = None if context is None else context.repeated(b)
    alone = refine_and_score(seen, frames.into(candidates).flatten(0, 1).unsqueeze(1), scorer, where, cfg, spec)
    blocks = [frames.back(block.unflatten(0, (n, b))) for block in alone.candidates.unbind(1)]
    blocks[0] = candidates
    group, scores = torch.cat(blocks, 1), torch.cat([part.unflatten(0, (n, b)) for part in alone.scores.unbind(1)], 1)
    if scorer.needs_group and cfg.select != "mean":  # it compares the members, which are alone in their frames
        return Refined(group, scored(state, group, scorer, context), alone.evaluations + len(blocks))
    return Refined(group, scores, alone.evaluations)


def copies(steps: int, lengths: Sequence[float]) -> int:
    """Number of members of a refined group for each candidate, including itself."""
    return 1 + steps * len(lengths)


def _climb(
    state: Tensor,
    candidates: Tensor,
    scorer: Scorer,
    context: ScoreContext | None,
    steps: int,
    lengths: Sequence[float],
    trust: float | None,
    spec: StateSpec | None,
) -> tuple[list[Tensor], list[Tensor | None], int]:
    """Return the blocks of the refined group, their known scores, and the reward evaluations per candidate."""
    blocks, current, evaluations = [candidates], candidates, 0
    scores: list[Tensor | None] = [None]
    scale = channel_spread(state).unsqueeze(1)
    for left in reversed(range(steps)):
        move, known = scorer.ascent_and_scores(state, current, context)
        evaluations += 1
        if move.shape != current.shape:
            raise ValueError(f"{type(scorer).__name__}.ascent returned shape {tuple(move.shape)}; expected {tuple(current.shape)}")
        if spec is not None and spec.given_channels:
            move = spec.carried(move, torch.zeros_like(move), channel_axis=2)
        if len(blocks) == 1:
            scores[0] = known
        elif known is not None and len(lengths) == 1:  # ``current`` is then the last block if that is finite
            scores[-1] = torch.where(finite_states(blocks[-1], 2), known, -torch.inf)
        moved = [_within(candidates, current + length * move, state, scale, trust) for length in lengths]
        moved = [torch.where(over(stays_physical(candidates, copy, spec, context), copy), copy, torch.nan) for copy in moved]
        blocks += moved
        scores += [None] * len(moved)
        if left and len(lengths) == 1:
            current = torch.where(over(finite_states(moved[0], 2), moved[0]), moved[0], current)
        elif left:
            found = scored(state, torch.cat(moved, 1), scorer, context)
            evaluations += len(moved)
            scores[-len(moved) :] = found.chunk(len(moved), 1)
            current = _best(current, moved, found)
    return blocks, scores, evaluations


def _within(candidates: Tensor, moved: Tensor, state: Tensor, scale: Tensor, trust: float | None) -> Tensor:
    """Pull ``moved`` back towards its candidate where it is outside the trust region."""
    if trust is None:
        return moved
    away, reach = _size(moved - candidates, scale), trust * _size(candidates - state.unsqueeze(1), scale)
    share = torch.where(away > reach, reach / away, 1.0).to(moved.dtype)
    return torch.where(over(away > reach, moved), candidates + over(share, moved) * (moved - candidates), moved)


def _size(change: Tensor, scale: Tensor) -> Tensor:
    """Return the norm over channels and cells of ``[N, B, C, *S]`` in units of ``scale``, float64 ``[N, B]``."""
    return (change / scale).double().square().flatten(2).sum(2).sqrt()


def _best(current: Tensor, moved: list[Tensor], found: Tensor) -> Tensor:
    """Return the highest-scoring copy of each candidate, or the candidate itself if no copy is usable."""
    n, b = current.shape[:2]
    scores = found.view(n, len(moved), b)
    finite = torch.stack([finite_states(m, 2) for m in moved], 1) & scores.isfinite()
    scores = torch.where(finite, scores, -torch.inf)
    for i, copy in enumerate(moved):
        best = finite[:, i] & (scores.argmax(1) == i)
        current = torch.where(over(best, copy), copy, current)
    return current


def scored(state: Tensor, candidates: Tensor, scorer: Scorer, context: ScoreContext | None) -> Tensor:
    """``scorer.score_group``; raises ``ValueError`` unless it returns one score per candidate, ``[N, B]``."""
    scores = scorer.score_group(state, candidates, context)
    if scores.shape != candidates.shape[:2]:
        raise ValueError(
            f"{type(scorer).__name__} returned shape {tuple(scores.shape)}; expected {tuple(candidates.shape[:2])}: return one score per "
            "candidate, [N, B], from score_group"
        )
    return scores
