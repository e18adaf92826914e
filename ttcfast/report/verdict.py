"""The plan's question to ``ttcfast protocol``: does a flow meet or exceed the MLP, in return and in ESNR, and would a residual do as well?

Arms are compared by the differences of runs with one random seed, which share data, batches and initial policy.

Source: Flow plan, "Acceptance Criteria"; docs/design/decisions.md ("Measured policies").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch

from ttcfast.evaluation.results import bootstrap_interval
from ttcfast.pwm.arms import Arm
from ttcfast.pwm.policy_result import PolicyResult

from .policies import by_task_and_arm, final_return, mean, median_esnr_db

BASELINE, CONTROL = "mlp", "residual"
Measure = Callable[[PolicyResult, PolicyResult], tuple[float, float]]


@dataclass(frozen=True)
class Difference:
    """Mean difference of two arms on one task over ``seeds`` pairs of runs, with its 95 % bootstrap interval (NaN for one pair)."""

    task: str
    mean: float
    low: float
    high: float
    seeds: int

    @property
    def met(self) -> bool:
        """Whether the first arm meets or exceeds the second, by the mean."""
        return self.mean >= 0

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def words(self, unit: str) -> str:
        """Return ``cartpole-swingup +12 [-5, 30] (5 seeds, not told apart)``."""
        if not math.isfinite(self.low):
            return f"{self.task} {_signed(self.mean, unit)} ({self.seeds} seed, no interval)"
        told = "told apart" if self.decided else "not told apart"
        return f"{self.task} {_signed(self.mean, unit)} [{_signed(self.low)}, {_signed(self.high)}] ({self.seeds} seeds, {told})"


def sentences(results: Sequence[PolicyResult]) -> list[str]:
    """Return the verdict: at equal parameters, at equal seconds, ESNR, the answer, and the residual control."""
    flow = best_flow(results)
    if flow is None:
        return ["No verdict: it takes a flow and the MLP with one random seed on one task."]
    name, gap = Arm(flow).label, max(abs(run.dynamics_gap) for run in results if run.arm == flow)
    equal, timed, esnr = (differences(results, flow, BASELINE, measure) for measure in (at_the_end, at_equal_time, esnr_of_both))
    better, clock = [d for d in esnr if d.mean > 0], "processor seconds" if all(map(_on_cpu, results)) else "wall-clock"
    return [
        f"Best flow arm by these returns: {name}. Differences are of runs with one random seed, with 95 % bootstrap intervals over seeds.",
        f"At equal parameters (dynamics within {100 * gap:.2f} %), {_told(name, 'the MLP', equal)}.",
        f"At equal {clock} (both learning curves read where the quicker run ended; until its world model is trained, a run has the return "
        f"of its initial policy), {_told(name, 'the MLP', timed)}.",
        f"ESNR of the actor's gradient (raw, median over the run) is above the MLP's on {len(better)} of {len(esnr)} tasks: "
        f"{'; '.join(d.words(' dB') for d in esnr) or 'none was measured'}.",
        'Acceptance of the plan, "meets or exceeds baseline on at least 50 % of tasks, with better ESNR on at least one": '
        f"{_answer(equal, esnr)} at equal parameters, {_answer(timed, esnr)} at equal {clock}, by the means; intervals exclude 0 on "
        f"{sum(d.decided for d in equal)} and {sum(d.decided for d in timed)} tasks.",
        *_control(results, flow),
    ]


def best_flow(results: Sequence[PolicyResult]) -> str | None:
    """Return the flow arm that can be compared with the MLP on most tasks, of several the one with the highest mean return; else None."""
    found: dict[str, tuple[int, float]] = {}
    for arm in dict.fromkeys(run.arm for run in results if Arm(run.arm).kind == "flow"):
        tasks = [d.task for d in differences(results, arm, BASELINE, at_the_end)]
        groups = by_task_and_arm(results)
        if tasks:
            found[arm] = len(tasks), fmean(mean(map(final_return, groups[task, arm])) for task in tasks)
    return max(found, key=lambda arm: found[arm], default=None)


def differences(results: Sequence[PolicyResult], ours: str, theirs: str, measure: Measure) -> list[Difference]:
    """Return ``ours`` minus ``theirs`` for every task with a pair of runs that can be compared."""
    groups, found = by_task_and_arm(results), []
    for task in dict.fromkeys(run.task for run in results):
        others = {run.seed: run for run in groups.get((task, theirs), [])}
        pairs = [measure(run, others[run.seed]) for run in groups.get((task, ours), []) if run.seed in others]
        values = [a - b for a, b in pairs if math.isfinite(a - b)]
        if values:
            low, high = bootstrap_interval(torch.tensor(values, dtype=torch.float64))
            found.append(Difference(task, fmean(values), low, high, len(values)))
    return found


def at_the_end(a: PolicyResult, b: PolicyResult) -> tuple[float, float]:
    """Return both final returns."""
    return final_return(a), final_return(b)


def at_equal_time(a: PolicyResult, b: PolicyResult) -> tuple[float, float]:
    """Return both returns after the seconds, world model included, of the run that ended first; see :func:`times`."""
    seconds = min(times(run)[-1] if run.evaluations else math.nan for run in (a, b))
    return return_after(a, seconds), return_after(b, seconds)


def esnr_of_both(a: PolicyResult, b: PolicyResult) -> tuple[float, float]:
    """Return both medians of the actor's ESNR in dB."""
    return median_esnr_db(a), median_esnr_db(b)


def return_after(run: PolicyResult, seconds: float) -> float:
    """Return the learning curve ``seconds`` after the start of the world model's training, linear between evaluations; see :func:`times`.

    Before the first evaluation it is the initial policy's return, NaN if that was not measured. A run that was made to last no longer
    might have done better, since learning rates fall to the end.
    """
    if not run.evaluations or not math.isfinite(final_return(run)):
        return math.nan
    at, values = times(run), [e.mean for e in run.evaluations]
    return math.nan if seconds < at[0] and run.evaluations[0].step else float(np.interp(seconds, at, values))


def times(run: PolicyResult) -> list[float]:
    """Return the seconds of training before each evaluation: processor time on a CPU, which may be shared, and wall-clock on a GPU.

    Where a result does not keep them, all updates of the policy count as equally long, and processor time is spread like wall-clock.
    """
    kept = [e.cpu_seconds if _on_cpu(run) else e.seconds for e in run.evaluations]
    if all(map(math.isfinite, kept)):
        return kept
    wall, last = run.wm_seconds + run.policy_seconds, run.evaluations[-1].step
    stretch = run.cpu_seconds / wall if _on_cpu(run) and wall else 1.0
    return [stretch * (run.wm_seconds + run.policy_seconds * (e.step / last if last else 1.0)) for e in run.evaluations]


def _on_cpu(run: PolicyResult) -> bool:
    return run.device == "cpu"


def _control(results: Sequence[PolicyResult], flow: str) -> list[str]:
    """Return what the residual, which is no flow but has its skip connection, reaches."""
    against_mlp = differences(results, CONTROL, BASELINE, at_the_end)
    against_flow = differences(results, flow, CONTROL, at_the_end)
    if not against_mlp:
        return ["No runs of the residual MLP as control."]
    told = [f"Control: {_told(Arm(CONTROL).label, 'the MLP', against_mlp)}."]
    return told + [f"Against this control, {_told(Arm(flow).label, 'it', against_flow)}."] * bool(against_flow)


def _told(ours: str, theirs: str, found: Sequence[Difference]) -> str:
    if not found:
        return f"{ours} and {theirs} cannot be compared: the quicker run ended before the slower one's first evaluation"
    listed = "; ".join(d.words("") for d in found)
    return f"{ours} meets or exceeds {theirs} on {sum(d.met for d in found)} of {len(found)} tasks: {listed}"


def _answer(returns: Sequence[Difference], esnr: Sequence[Difference]) -> str:
    if not returns:
        return "open"
    return "yes" if 2 * sum(d.met for d in returns) >= len(returns) and any(d.mean > 0 for d in esnr) else "no"


def _signed(value: float, unit: str = "") -> str:
    return (f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.2g}") + unit
