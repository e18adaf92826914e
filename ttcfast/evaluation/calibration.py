"""Scores of candidates beside their true errors, on states of the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.core.base_fm import Surrogate
from ttcfast.evaluation.evaluate import Problems
from ttcfast.evaluation.methods import starts_deterministic
from ttcfast.rewards.oracle import OracleScorer
from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.spec import TTCConfig
from ttcfast.ttc.guardrails import Spread


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Scores and true errors of M groups of B candidates.

    Args:
        errors: float64 ``[M, B]``, mean squared error of the predicted channels in the units of the problems; infinite for a non-finite
            candidate.
        scores: float64 ``[M, B]`` by reward; -inf for a rejected candidate.
        problems, steps: ``[M]``, problem and step of each group's state.
    """

    errors: Tensor
    scores: Mapping[str, Tensor]
    problems: tuple[int, ...]
    steps: tuple[int, ...]


@torch.no_grad()
def candidate_scores(
    surrogate: Surrogate, problems: Problems, scorers: Mapping[str, Scorer], config: TTCConfig, *, groups: int = 32
) -> CandidateScores:
    """Draw the candidates of a rollout from true states, score them, and measure their true errors.

    Each group holds the deterministic step first, if ``config`` includes it, then the sampled candidates by their ids, without projection
    and refinement. States are processed one at a time to hold no more than B candidates; ``groups * B`` model evaluations.

    Args:
        surrogate: The model, on the device to run on.
        problems: Their truth gives the states and the errors.
        scorers: Rewards by name.
        config: B, random seed, noise, and whether the deterministic step is a candidate.
        groups: Number of states, spread evenly over problems and steps; at most as many as there are.

    Raises:
        ValueError: ``groups`` is below 1.
    """
    at_least("groups", groups, 1)
    device = next((p.device for p in surrogate.parameters()), torch.device("cpu"))
    oracle = OracleScorer(problems.truth, scale=problems.scale, spec=problems.spec)
    first = int(starts_deterministic(surrogate, config))
    ids = torch.arange(first, config.branching_factor, device=device)
    everything = len(problems.truth) * problems.scored
    # Strides over (step, problem) pairs: early and late steps, every problem in turn.
    picked = [round(i * everything / min(groups, everything)) for i in range(min(groups, everything))]
    places = [(place % len(problems.truth), place // len(problems.truth)) for place in picked]
    errors: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {name: [] for name in scorers}
    for problem, step in places:
        where = torch.tensor([problem], device=device)
        state = problems.truth[problem : problem + 1, step].to(device)
        window = problems.window(step, surrogate.history)[problem : problem + 1].to(device)
        key: dict[str, Any] = {"problem_ids": where, "seed": config.seed, "step": step}
        parts = [surrogate.deterministic(window, step=step, problem_ids=where).unsqueeze(1)] if first else []
        if len(ids):
            parts.append(surrogate.candidates(window, ids, **key, stochastic=config.stochastic))
        candidates = torch.cat(parts, 1)
        context = ScoreContext.at(step, where, surrogate.time_step)
        true = -oracle.score_group(state.cpu(), candidates.cpu(), ScoreContext(step, where.cpu()))[0].double()
        errors.append(true.nan_to_num(nan=torch.inf, posinf=torch.inf))
        for name, scorer in scorers.items():
            given = scorer.score_group(state, candidates, context)[0].double()
            flat = Spread.of(given.unsqueeze(0), scorer.spread_floor(state, context)).flat(config.min_score_spread)
            given = torch.where(flat & given.isfinite(), given[given.isfinite()].sum() / given.isfinite().sum(), given).cpu()
            scores[name].append(given.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf))
    stacked = {name: torch.stack(values) for name, values in scores.items()}
    return CandidateScores(torch.stack(errors), stacked, tuple(p for p, _ in places), tuple(s for _, s in places))
