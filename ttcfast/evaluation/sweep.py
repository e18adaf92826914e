"""Sweeps methods over branching factors, reusing the results of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ttcfast.core.base_fm import BaseFM
from ttcfast.rewards.scorer import Scorer
from ttcfast.spec import TTCConfig

from .evaluate import Evaluation, Problems, Report, evaluate_method
from .methods import Variant, starts_deterministic
from .results import MethodResult


@dataclass(frozen=True, eq=False)
class Sweep:
    """Methods at several branching factors, on the same problems.

    Args:
        results: One per method, projection and B.
        deterministic: The deterministic rollout.
        projected: The deterministic rollout with projection, or None.
        problems: N.
        steps: T.
        scored: Steps with a known truth.
    """

    results: tuple[MethodResult, ...]
    deterministic: MethodResult
    projected: MethodResult | None
    problems: int
    steps: int
    scored: int

    def __repr__(self) -> str:
        names = ", ".join(line[0].name for line in self.lines())
        return f"Sweep(B = {', '.join(map(str, self.branching_factors))} on {self.problems} problems: {names})"

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the conserved quantities whose drift is measured; () where nothing is conserved."""
        return tuple(self.deterministic.drift)

    @property
    def branching_factors(self) -> tuple[int, ...]:
        """Every B of the sweep, in ascending order."""
        return tuple(sorted({r.branching_factor for r in self.results}))

    def lines(self) -> list[list[MethodResult]]:
        """Return the results of each method and projection, in ascending order of B."""
        keys = dict.fromkeys((r.method, r.projected) for r in self.results)
        return [sorted((r for r in self.results if (r.method, r.projected) == key), key=lambda r: r.branching_factor) for key in keys]

    def references(self) -> list[MethodResult]:
        """Return the results that do not depend on B: the deterministic rollout without and, if there is one, with projection."""
        return [self.deterministic] if self.projected is None else [self.deterministic, self.projected]


def sweep_branching(
    surrogate: BaseFM,
    problems: Problems,
    scorers: Mapping[str, Scorer | Variant],
    config: TTCConfig,
    factors: Sequence[int],
    table: Evaluation,
    *,
    count: int,
    mean: bool = True,
    oracle: bool = True,
    projections: Sequence[bool] = (False,),
    report: Report | None = None,
) -> Sweep:
    """Run the mean of B, the scorers and the oracle at every B of ``factors`` on the first ``count`` problems.

    Results in ``table`` are not run again: B = 1 is the deterministic rollout if candidate 0 is the deterministic step, and the table's own
    B, which is always part of the sweep, is cut to the first ``count`` problems, with time and evaluations pro rata.

    Args:
        surrogate, problems, scorers, config, oracle, report: As in ``evaluate``.
        factors: Values of B.
        mean: Also sweep the mean of B.
        table: The evaluation of ``problems`` at ``config.branching_factor``.
        count: Number of problems to run on, at most that of ``problems``.
        projections: Whether to run without projection, with it, or both.
    """
    count = min(count, table.problems)
    few = problems.first(count)
    results = []
    for name in _names(scorers, mean, oracle):
        for projected in projections:
            for b in sorted({*factors, config.branching_factor}):
                result = _known(table, name, scorers, projected, b, surrogate, config)
                if result is None:
                    result = evaluate_method(
                        name, surrogate, few, scorers.get(name), dataclasses.replace(config, branching_factor=b), projected=projected
                    )
                    if report is not None:
                        report(result)
                results.append(result.first(count))
    reference = table.projected_baseline
    return Sweep(
        tuple(results),
        deterministic=table.baseline.first(count),
        projected=None if reference is None else reference.first(count),
        problems=count,
        steps=table.steps,
        scored=table.scored,
    )


def runs_needed(
    scorers: Mapping[str, Scorer | Variant],
    factors: Sequence[int],
    config: TTCConfig,
    surrogate: BaseFM,
    *,
    mean: bool = True,
    oracle: bool = True,
) -> list[int]:
    """Return the branching factors that a sweep without or with projection really runs, method by method, to size a progress bar."""
    return [
        b
        for name in _names(scorers, mean, oracle)
        for b in sorted({*factors})
        if b != config.branching_factor and not (b == 1 and _deterministic_alone(name, scorers, surrogate, config))
    ]


def _names(scorers: Mapping[str, Scorer | Variant], mean: bool, oracle: bool) -> list[str]:
    return [*(["mean"] if mean else []), *scorers, *(["oracle"] if oracle else [])]


def _known(
    table: Evaluation, name: str, scorers: Mapping[str, Scorer | Variant], projected: bool, b: int, surrogate: BaseFM, config: TTCConfig
) -> MethodResult | None:
    if b == config.branching_factor:
        return table.find(name, projected=projected)
    if b == 1 and _deterministic_alone(name, scorers, surrogate, config):
        found = table.find("deterministic", projected=projected)
        return None if found is None else dataclasses.replace(found, method=name)
    return None


def _deterministic_alone(name: str, scorers: Mapping[str, Scorer | Variant], surrogate: BaseFM, config: TTCConfig) -> bool:
    """Whether at B = 1 this method has no other candidate than the deterministic step."""
    scorer = scorers.get(name)
    moved = name in scorers and (scorer.options if isinstance(scorer, Variant) else {}).get("refine_steps", config.refine_steps) > 0
    return starts_deterministic(surrogate, config) and not moved
