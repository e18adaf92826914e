"""What one method reached on a set of problems, and how far that is a gain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.metrics import fraction_improved, sample_gain

_REWARDS = {"arm": "ARM", "prm": "PRM", "arm_prm": "ARM + PRM"}
_USES = {"_refined": " refined", "_refined_oracle": " refined, oracle", "_softmax": " softmax mean", "_span": " span"}
_USES |= {"_beam": " beam", "_diverse_beam": " diverse beam", "_particle": " particles", "_lookahead": " looking ahead"}

LABELS: Mapping[str, str] = {
    "deterministic": "deterministic",
    "random": "random candidate",
    "mean": "mean of B",
    **_REWARDS,
    **{reward + use: label + how for reward, label in _REWARDS.items() for use, how in _USES.items()},
    "oracle": "oracle",
    "span_oracle": "span oracle",
    "finetuned": "fine-tuned surrogate",
}
"""How tables and figures call the methods; a name that is not here is shown as it is."""


QUANTITIES = ("mass", "momentum", "energy")
"""Totals whose drift is measured."""


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Errors, conservation and cost of one method on N problems. Tensors lie on the CPU.

    Args:
        method: ``"deterministic"``, ``"random"``, ``"mean"``, ``"arm"``, ``"oracle"`` or another scorer's name.
        projected: whether conservation was imposed at every step.
        branching_factor: B; 1 for the deterministic step and for one random candidate.
        mse: ``[N, K+1]``, squared error of steps 0..K in normalised units; K ends where the truth or the rollout does.
        drift: for ``"mass"``, ``"momentum"``, ``"energy"``: ``[N, T+1]``, relative change of the total since step 0, not negative.
        seconds: wall-clock time of the rollout of all N problems.
        evaluations: model evaluations of all N problems; one is one state through the model.
        fallbacks: steps (over all problems) that found no usable candidate and took the deterministic step.
        resamples: rounds of candidates drawn again.
        nonfinite: candidates rejected because of a NaN or an infinity.
        collapsed: steps whose scores hardly differed, so that candidate 0 was taken.
        unprojected: steps whose projection would have made a density or pressure negative, so that the raw state was kept.
        reward_evaluations: candidates scored and directions found to move them in, of all N problems.
        trajectory: ``[len(shown), T+1, C, *S]`` in physical units, of the problems to show; None where none was kept.
        beam_width: k, partial rollouts kept at each step; ``branching_factor`` is then of each of them.
        recorded: where these numbers come from when they were not measured in this run.
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
        """K, the number of steps that have a truth."""
        return self.mse.shape[1] - 1

    @property
    def rollout_error(self) -> Tensor:
        """``[N]``: mean squared error over steps 1..K, the error that gains are stated in."""
        return self.mse[:, 1:].mean(dim=1)

    @property
    def blown_up(self) -> Tensor:
        """Bool ``[N]``: problems whose error is not finite at some step."""
        return ~self.mse.isfinite().all(dim=1)

    def mse_at(self, step: int) -> float:
        """Mean over problems of the squared error at ``step``; NaN beyond the truth."""
        return float(self.mse[:, step].mean()) if step <= self.steps else math.nan

    def final_drift(self, quantity: str) -> float:
        """Mean over problems of the relative drift of ``quantity`` after the last step; NaN where it is not defined."""
        return float(self.drift[quantity][:, -1].mean()) if quantity in self.drift else math.nan

    def first(self, n: int) -> MethodResult:
        """The same for the first ``n`` problems; time, evaluations and counts pro rata, since they are known only for all together."""
        total = self.mse.shape[0]
        if n == total:
            return self
        share = n / total
        counts = ("evaluations", "reward_evaluations", "fallbacks", "resamples", "nonfinite", "collapsed", "unprojected")
        return dataclasses.replace(
            self,
            mse=self.mse[:n],
            drift={quantity: value[:n] for quantity, value in self.drift.items()},
            seconds=self.seconds * share,
            **{count: round(getattr(self, count) * share) for count in counts},
            trajectory=None,
        )


@dataclass(frozen=True, eq=False)
class Gain:
    """SampleGain of a method against a reference, per problem and summarised.

    A problem on which only the method blew up counts as minus infinity, one on which only the reference did as 100 (the limit of the
    formula), one on which both did as NaN and as not improved.

    Args:
        per_problem: ``[N]``, 100 (reference - method) / reference of the error averaged over steps 1..K, in percent.
        improved: percent of the problems whose error is smaller than the reference's.

    Source: docs/design/decisions.md ("Honest baselines").
    """

    per_problem: Tensor
    improved: float

    @classmethod
    def of(cls, result: MethodResult, reference: MethodResult) -> Gain:
        """The gain of ``result`` over ``reference``, over the steps that both have."""
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
        return float(self.per_problem.mean())

    @property
    def median(self) -> float:
        """Over the problems where it is defined; the mean of the middle two for an even number."""
        ordered = self.per_problem[~self.per_problem.isnan()].sort().values
        if not len(ordered):
            return math.nan
        return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    @property
    def standard_error(self) -> float:
        """Of the mean, over problems; NaN for a single one."""
        n = len(self.per_problem)
        return float(self.per_problem.std() / math.sqrt(n)) if n > 1 else math.nan
