"""Baseline rollouts, which use the same candidates without a reward.

Source: docs/design/decisions.md ("Honest baselines").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.spec import TTCConfig
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.models import as_source
from ttcfast.ttc.result import RolloutResult

BASELINES = ("deterministic", "random", "mean")


def baseline_rollout(
    kind: str, fm: Any, x0: Tensor, T: int, cfg: TTCConfig | None = None, *, problem_ids: Tensor | None = None
) -> RolloutResult:
    """Roll out without a reward, with the code, guardrails and projection of ``TTCGreedy``.

    Args:
        kind: ``"deterministic"``, without noise, one evaluation per step; ``"random"``, one stochastic candidate per step (under
            symmetries one of B at random, at the cost of all); ``"mean"``, the mean of the B candidates, including the deterministic one
            if ``cfg`` does.
        fm, x0, T, problem_ids: As for ``TTCGreedy.rollout``.
        cfg: B (for the mean), random seed, stochasticity, projection and chunking; score options are ignored.

    Raises:
        ValueError: An unknown ``kind``, ``"deterministic"`` for a model without a deterministic step, or as ``TTCGreedy``.
    """
    one_of("kind", kind, BASELINES)
    cfg = dataclasses.replace(cfg or TTCConfig(), score_floor=None, select="argmax", temperature=1.0, refine_steps=0)
    source = as_source(fm, cfg)
    noise = source.stochastic
    if kind == "random" and noise is not None and noise.symmetry:  # the first candidate alone always has the identity
        return TTCGreedy(fm, AtRandom(source.ndim, cfg.seed), cfg).rollout(x0, T, return_info=True, problem_ids=problem_ids)
    if kind != "mean":
        cfg = dataclasses.replace(cfg, branching_factor=1, include_deterministic=kind == "deterministic")
    else:
        cfg = dataclasses.replace(cfg, select="mean")
    return TTCGreedy(fm, Indifferent(source.ndim), cfg).rollout(x0, T, return_info=True, problem_ids=problem_ids)


class Indifferent(Scorer):
    """Scores every candidate 0."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.ndim = ndim

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return torch.zeros(candidates.shape[:2], device=candidates.device)


class AtRandom(Scorer):
    """Scores candidates by random numbers that depend on random seed, step and problem."""

    needs_group = True

    def __init__(self, ndim: int, seed: int) -> None:
        super().__init__()
        self.ndim, self.seed = ndim, seed

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        step, ids = (0, range(len(state))) if context is None else (context.step, context.problem_ids.tolist())
        drawn = [np.random.default_rng([self.seed, step, problem]).random(candidates.shape[1]) for problem in ids]
        return torch.from_numpy(np.stack(drawn)).to(candidates)
