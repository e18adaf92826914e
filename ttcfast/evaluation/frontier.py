"""The compute frontier: error against model evaluations, search by search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ttcfast.core.base_fm import BaseFM
from ttcfast.rewards.oracle import OracleScorer
from ttcfast.rewards.scorer import Scorer
from ttcfast.spec import TTCConfig

from .evaluate import Problems, Report, evaluate_method
from .methods import ONE_BEAM, Variant
from .results import MethodResult

SEARCHES = ("greedy", "lookahead", "beam", "diverse_beam", "particle")
BEAMS = 4
"""Most beams that a search keeps."""


@dataclass(frozen=True, eq=False)
class Frontier:
    """Searches at several numbers of evaluations, on the same problems.

    Args:
        results: By (reward, search), in ascending order of evaluations.
        deterministic: The deterministic rollout, the reference of the errors.
        problems: N.
        steps: T.
    """

    results: Mapping[tuple[str, str], tuple[MethodResult, ...]]
    deterministic: MethodResult
    problems: int
    steps: int

    def __repr__(self) -> str:
        names = ", ".join(f"{reward} by {search}" for reward, search in self.results)
        return f"Frontier({self.problems} problems, {self.steps} steps: {names})"

    def per_step(self, result: MethodResult) -> float:
        """Return the model evaluations per problem and step."""
        return result.evaluations / (self.problems * self.steps)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per point."""
        base = float(self.deterministic.rollout_error.mean())
        return [
            {
                "reward": reward,
                "search": search,
                "beam_width": r.beam_width,
                "branching_factor": r.branching_factor,
                "evaluations_per_step": self.per_step(r),
                "evaluations": r.evaluations,
                "seconds": round(r.seconds, 3),
                "rollout_mse": float(r.rollout_error.mean()),
                "ratio_to_deterministic": float(r.rollout_error.mean()) / base,
            }
            for (reward, search), found in self.results.items()
            for r in found
        ]


def trace_frontier(
    surrogate: BaseFM,
    problems: Problems,
    rewards: Mapping[str, Scorer],
    config: TTCConfig,
    evaluations: Sequence[int],
    *,
    oracle: bool = True,
    report: Report | None = None,
) -> Frontier:
    """Run every search with every reward at about so many model evaluations per problem and step.

    Args:
        surrogate, problems, config, report: As in ``evaluate``; the search options of ``config`` are ignored.
        rewards: Rewards by name.
        evaluations: Model evaluations per problem and step. A search that needs more is left out.
        oracle: Also search by true error, the ceiling of each search that chooses step by step.
    """
    scorers = dict(rewards)
    if oracle:
        scorers["oracle"] = OracleScorer(problems.truth, scale=problems.scale, spec=problems.spec)
    results: dict[tuple[str, str], tuple[MethodResult, ...]] = {}
    for name, scorer in scorers.items():
        for search in SEARCHES:
            found = []
            for options in filter(None, (search_of(search, count) for count in sorted(evaluations))):
                plain: dict[str, Any] = {"select": "argmax", "refine_steps": 0, "temperature": 1.0, **ONE_BEAM}
                if search == "particle" and config.shard is not None:
                    plain["shard"] = "problems"  # particles weigh all candidates of a step at once
                result = evaluate_method(f"{name}_{search}", surrogate, problems, Variant(scorer, {**plain, **options}), config)
                found.append(result)
                if report is not None:
                    report(result)
            if found:
                results[name, search] = tuple(found)
    return Frontier(results, evaluate_method("deterministic", surrogate, problems, None, config), len(problems.truth), problems.steps)


def search_of(search: str, evaluations: int) -> dict[str, Any] | None:
    """Return options of ``TTCConfig`` with which a search takes about so many evaluations per step, or None if it needs more."""
    if search == "greedy":
        return {"branching_factor": evaluations}
    if search == "lookahead":
        return {"branching_factor": evaluations // 2, "lookahead": 1} if evaluations >= 4 else None
    k = next((k for k in range(BEAMS, 1, -1) if k * k <= evaluations), None)
    return None if k is None else {"approach": search, "beam_width": k, "branching_factor": evaluations // k}
