"""The result of one method on a set of problems, and its gain over a reference."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ttcfast.metrics import fraction_improved, sample_gain

_REWARDS = {"arm": "ARM", "prm": "PRM", "arm_prm": "ARM + PRM", "residual": "residual"}
_USES = {"_refined": " refined", "_refined_oracle": " refined, oracle", "_softmax": " softmax mean", "_span": " span"}
_USES |= {"_corrector": " corrector alone", "_mean": " mean", "_symmetry": " corrector, mean over symmetries"}
_USES |= {
    "_solver": " corrector, with solver",
    "_solver_choice": " of surrogate and solver",
    "_solver_span": " between surrogate and solver",
}
_USES |= {"_beam": " beam", "_diverse_beam": " diverse beam", "_particle": " particles", "_lookahead": " looking ahead"}

LABELS: Mapping[str, str] = {
    "persistence": "persistence",
    "deterministic": "deterministic",
    "random": "random candidate",
    "mean": "mean of B",
    "symmetry_mean": "mean over symmetries",
    **_REWARDS,
    **{reward + use: label + how for reward, label in _REWARDS.items() for use, how in _USES.items()},
    "surrogate_solver": "mean of surrogate and solver",
    "oracle": "oracle",
    "span_oracle": "span oracle",
    "finetuned": "fine-tuned surrogate",
}
"""Labels of the methods in tables and figures; other names are shown unchanged."""


RESAMPLES = 10_000
"""Samples of the bootstrap."""


def chooses_by_reward(method: str) -> bool:
    """Return whether this method uses a reward, and is no baseline, choice by true error, classical solver or corrector alone."""
    plain = ("persistence", "deterministic", "random", "mean", "symmetry_mean", "finetuned", "surrogate_solver")
    return method not in plain and not any(part in method for part in ("oracle", "solver ", "_corrector"))


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Errors, conservation and cost of one method on N problems. Tensors are on the CPU.

    Args:
        method: ``"persistence"``, ``"deterministic"``, ``"random"``, ``"mean"``, ``"arm"``, ``"oracle"`` or another scorer's name.
        projected: Whether conservation was imposed at every step.
        branching_factor: B; 1 for the deterministic step and for one random candidate.
        mse: ``[N, K+1]``, mean squared error of steps 0..K in normalised units; K is the last step that both truth and rollout have.
        drift: ``[N, T+1]`` for each conserved quantity of the layout, by name (mass, momentum and energy of a gas): magnitude of the
            relative change of its total since step 0. Empty where nothing is conserved.
        seconds: Wall-clock time for all N problems.
        evaluations: Model evaluations for all N problems; one evaluation is one state through the model.
        fallbacks: Steps, over all problems, without a usable candidate, which took the deterministic step.
        resamples: Rounds in which candidates were drawn again.
        nonfinite: Candidates rejected for a NaN or an infinity.
        collapsed: Steps that took candidate 0 because the scores hardly differed.
        unprojected: Steps left unprojected because projection would have made a density or pressure negative.
        variances: float64 ``[N, bands]``, variance of the state at step K in octaves of wavelength (``metrics.band_variances``), summed
            over the predicted channels in normalised units; None where it is not known.
        solver_steps: Steps of a classical solver among the candidates, for all N problems.
        reward_evaluations: Candidates scored and refinement directions computed, for all N problems.
        trajectory: ``[len(shown), T+1, C, *S]`` in physical units, of the shown problems; None if none was kept.
        beam_width: k, beams kept at each step; ``branching_factor`` then counts the candidates per beam.
        peak_bytes: Most memory held while the method ran (``RolloutResult.peak_bytes``); None where it is not known.
        recorded: Origin of the numbers if they were not measured in this run.
        chunk_size: Most candidates made at once (``RolloutResult.chunk_size``); None for all of a step.
    """

    method: str
    projected: bool
    branching_factor: int
    mse: Tensor
    drift: dict[str, Tensor]
    seconds: float
    evaluations: int
    fallbacks: int = 0
    resamples: int = 0
    nonfinite: int = 0
    collapsed: int = 0
    unprojected: int = 0
    reward_evaluations: int = 0
    trajectory: Tensor | None = None
    recorded: str | None = None
    beam_width: int = 1
    solver_steps: int = 0
    variances: Tensor | None = None
    peak_bytes: int | None = None
    chunk_size: int | None = None

    def __repr__(self) -> str:
        error = float(self.rollout_error.mean())
        size = f"{self.mse.shape[0]} problems, {self.steps} steps, {self.evaluations} evaluations"
        return f"MethodResult({self.name}: rollout MSE {error:.3g}, {size})"

    @property
    def name(self) -> str:
        """``"ARM"``, or ``"ARM + projection"``."""
        beams = f" k = {self.beam_width}" if self.beam_width > 1 else ""
        return LABELS.get(self.method, self.method) + beams + (" + projection" if self.projected else "")

    @property
    def steps(self) -> int:
        """K, the number of steps with a known truth."""
        return self.mse.shape[1] - 1

    @property
    def rollout_error(self) -> Tensor:
        """Mean squared error over steps 1..K, ``[N]``, from which gains are computed."""
        return self.mse[:, 1:].mean(dim=1)

    @property
    def blown_up(self) -> Tensor:
        """Which problems have a non-finite error at some step, bool ``[N]``."""
        return ~self.mse.isfinite().all(dim=1)

    def mse_at(self, step: int) -> float:
        """Return the mean squared error over problems at ``step``; NaN beyond the truth."""
        return float(self.mse[:, step].mean()) if step <= self.steps else math.nan

    def interval_at(self, step: int) -> tuple[float, float]:
        """Return the 95 % interval of ``mse_at(step)`` over problems (``bootstrap_interval``)."""
        return bootstrap_interval(self.mse[:, step]) if step <= self.steps else (math.nan, math.nan)

    def final_drift(self, quantity: str) -> float:
        """Return the mean relative drift of ``quantity`` after the last step; NaN if it is undefined."""
        return float(self.drift[quantity][:, -1].mean()) if quantity in self.drift else math.nan

    def largest_final_drift(self, quantities: Sequence[str]) -> float:
        """Return the largest of the mean relative drifts of ``quantities`` after the last step; NaN if none is defined."""
        found = [drift for quantity in quantities if not math.isnan(drift := self.final_drift(quantity))]
        return max(found, default=math.nan)

    def first(self, n: int) -> MethodResult:
        """Return the result for the first ``n`` problems, with time, evaluations and counts pro rata."""
        total = self.mse.shape[0]
        if n == total:
            return self
        share = n / total
        counts = ("evaluations", "reward_evaluations", "solver_steps", "fallbacks", "resamples", "nonfinite", "collapsed", "unprojected")
        return dataclasses.replace(
            self,
            mse=self.mse[:n],
            drift={quantity: value[:n] for quantity, value in self.drift.items()},
            seconds=self.seconds * share,
            **{count: round(getattr(self, count) * share) for count in counts},
            trajectory=None,
            variances=None if self.variances is None else self.variances[:n],
        )


def bootstrap_interval(values: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``values [N]`` by the percentile bootstrap; NaN for one value, or if one is not finite.

    The mean of ``RESAMPLES`` samples of N values, drawn with replacement, lies between both ends in 95 % of them. The samples depend on N
    alone, so that methods are resampled on the same problems.
    """
    if len(values) < 2 or not bool(values.isfinite().all()):
        return math.nan, math.nan
    means = _resampled(len(values)) @ values.double().cpu()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def ratio_interval(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Return the mean of ``ours [N]`` over that of ``theirs [N]``, and the 95 % interval of this ratio by the percentile bootstrap.

    Both means are taken over the same samples of problems, those of ``bootstrap_interval``. NaN where a value is not finite; the interval
    of a single problem is NaN.
    """
    if not bool(ours.isfinite().all() and theirs.isfinite().all()):
        return math.nan, math.nan, math.nan
    ratio = float(ours.double().mean() / theirs.double().mean())
    if len(ours) < 2:
        return ratio, math.nan, math.nan
    weights = _resampled(len(ours))
    found = (weights @ ours.double().cpu()) / (weights @ theirs.double().cpu())
    low, high = found.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ratio, low, high


@lru_cache(maxsize=4)
def _resampled(n: int) -> Tensor:
    """Return the weights ``[RESAMPLES, n]`` of the values in every sample."""
    picks = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    return torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, picks, torch.full(picks.shape, 1 / n, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Gain:
    """SampleGain of a method against a reference, per problem and summarised.

    A problem counts as minus infinity if only the method blew up, as 100 (the limit of the formula) if only the reference did, and as NaN
    and not improved if both did.

    Args:
        per_problem: ``[N]``, 100 (reference - method) / reference, of the error averaged over steps 1..K, in percent.
        improved: Percentage of problems with a smaller error than the reference.

    Source: docs/design/decisions.md ("Honest baselines").
    """

    per_problem: Tensor
    improved: float

    @classmethod
    def of(cls, result: MethodResult, reference: MethodResult) -> Gain:
        """Compute the gain of ``result`` over ``reference`` on the steps that both have."""
        steps = min(result.steps, reference.steps) + 1
        ours, theirs = result.mse[:, 1:steps].mean(dim=1), reference.mse[:, 1:steps].mean(dim=1)
        gain = sample_gain(theirs, ours)
        gain = torch.where(ours.isfinite() & ~theirs.isfinite(), 100.0, gain)
        gain = torch.where(~ours.isfinite() & theirs.isfinite(), -math.inf, gain)
        gain = torch.where(~ours.isfinite() & ~theirs.isfinite(), math.nan, gain)
        return cls(gain, fraction_improved(theirs, ours))

    def __repr__(self) -> str:
        return f"Gain({self.mean:.3g} % on average, {self.improved:.3g} % of {len(self.per_problem)} problems improved)"

    @property
    def mean(self) -> float:
        """Mean over problems."""
        return float(self.per_problem.mean())

    @property
    def median(self) -> float:
        """Median over the problems where the gain is defined."""
        ordered = self.per_problem[~self.per_problem.isnan()].sort().values
        if not len(ordered):
            return math.nan
        return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over problems; NaN for a single problem."""
        n = len(self.per_problem)
        return float(self.per_problem.std() / math.sqrt(n)) if n > 1 else math.nan
