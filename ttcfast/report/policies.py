"""The table that compares the policies of ``ttcfast protocol``, a row per task and arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import torch

from ttcfast.evaluation.results import RESAMPLES, bootstrap_interval
from ttcfast.evaluation.table import MISSING
from ttcfast.pwm.arms import Arm
from ttcfast.pwm.policy_result import PolicyResult

_NAMES = ("task", "arm", "seed", "mode", "detach")
_COSTS = (
    *("parameters", "dynamics_gap", "dynamics_evaluations", "field_evaluations", "own_episodes", "failed"),
    *("wm_seconds", "policy_seconds", "cpu_seconds", "skipped", "stopped"),
)


def final_return(run: PolicyResult) -> float:
    """Mean return of the last evaluation, NaN for a run that was stopped before its policy was evaluated."""
    return run.evaluations[-1].mean if run.evaluations else math.nan


def median_esnr_db(run: PolicyResult) -> float:
    """Median over the run of the raw ESNR of the actor's gradient."""
    return _median(e.esnr_db for e in run.evaluations)


def run_rows(results: Sequence[PolicyResult]) -> list[dict[str, Any]]:
    """Return one flat row per run, as in ``runs.csv``."""
    return [_row(run) for run in results]


def summary(results: Sequence[PolicyResult]) -> list[dict[str, Any]]:
    """Return one flat row per task and arm, as in ``table.csv``.

    Numbers are means over the runs in which they are finite, but for errors, which are NaN or infinite if one is.
    """
    rows = []
    for (task, arm), runs in by_task_and_arm(results).items():
        held = run_rows(runs)
        returns = [value for value in map(final_return, runs) if math.isfinite(value)]
        low, high = bootstrap_interval(torch.tensor(returns, dtype=torch.float64))
        same = {"task": task, "arm": arm, "label": Arm(arm).label, "mode": runs[0].mode, "detach": runs[0].detach}
        sums = {name: sum(row[name] for row in held) for name in ("skipped", "stopped", "failed")}
        means = {key: _mean_of(key, held) for key in held[0] if key not in (*same, *sums, "seed")}
        interval = {"return": means.pop("return"), "return_low": low, "return_high": high}
        rows.append({**same, "seeds": len(runs), "seeds_with_return": len(returns), **interval, **means, **sums})
    return rows


def in_order(results: Iterable[PolicyResult]) -> list[PolicyResult]:
    """Sort runs by task, arm (the MLP, the residual, then flows) and random seed."""
    kinds = ("mlp", "residual", "flow")

    def order(run: PolicyResult) -> tuple[str, int, str, int, int]:
        arm = Arm(run.arm)
        return run.task, kinds.index(arm.kind), arm.method or "", arm.substeps or 0, run.seed

    return sorted(results, key=order)


def by_task_and_arm(results: Sequence[PolicyResult]) -> dict[tuple[str, str], list[PolicyResult]]:
    """Group the runs by task and arm, in order."""
    found: dict[tuple[str, str], list[PolicyResult]] = {}
    for run in results:
        found.setdefault((run.task, run.arm), []).append(run)
    return found


def cells(results: Sequence[PolicyResult]) -> tuple[list[str], list[list[str]]]:
    """Return the column heads and the text of every cell; the first two columns are text."""
    heads = [
        "task",
        "dynamics",
        "seeds",
        "detach",
        "return\n[95 %]",
        "\nbest",
        "observation error\nbefore / after",
        "reward error\nbefore / after",
    ]
    heads += ["ESNR dB\nlast / median", "unbiased dB\nlast / median", "gradient\ncosine", "value pred.\n/ realised"]
    heads += ["evals\n/ step", "train\nevals", "model\ns", "policy\ns", "CPU\ns", "\nskipped", "\nstopped"]
    return heads, [_cells(row) for row in summary(results)]


def explanation(results: Sequence[PolicyResult]) -> list[str]:
    """Return the meaning of the columns, and what is missing."""
    steps = ", ".join(map(str, sorted({len(run.errors.observation) for run in results})))
    episodes = ", ".join(map(str, sorted({len(run.evaluations[-1].returns) for run in results if run.evaluations})))
    lines = [
        f"return: of the last policy, mean over seeds of the mean over {episodes or 'no'} episodes, and its 95 % interval over seeds by "
        f"the percentile bootstrap ({RESAMPLES:,} samples). best: mean over seeds of the best evaluation, which is too high by its choice.",
        f"observation error: after {steps} imagined steps of held-out episodes, through a linear probe, in units of the observation's "
        "variance; reward error: of that step, in units of the reward's variance; before and after the policy's training.",
        "ESNR: of the actor's gradient, raw and unbiased, at the last evaluation and as median over the run. gradient cosine: of the "
        "actor's gradient with finite differences of the imagined return. detach: whether the gradient leaves out the part through the "
        "latents that the policy sees.",
        "value: discounted, of the episodes' first states, by the critic and as earned. evals / step: evaluations of the dynamics network "
        "per imagined step, the measure of equal cost. train evals: those of training, a batch counting as one.",
        "model s, policy s: wall-clock of the updates of world model and policy. CPU s: of both.",
    ]
    if without := [run for run in results if not math.isfinite(final_return(run))]:
        named = ", ".join(f"{run.task} {run.arm} seed {run.seed}" for run in without)
        lines.append(f"Without a return, and left out of means and intervals: {named}.")
    return lines


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN without one."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _mean_of(key: str, rows: Sequence[dict[str, Any]]) -> float:
    return fmean(row[key] for row in rows) if "_error" in key else mean(row[key] for row in rows)


def _row(run: PolicyResult) -> dict[str, Any]:
    own, last = asdict(run), run.evaluations[-1] if run.evaluations else None

    def final(name: str) -> float:
        return math.nan if last is None else float(getattr(last, name))

    returns = [value for e in run.evaluations if math.isfinite(value := e.mean)]
    return {
        **{name: own[name] for name in _NAMES},
        "return": final_return(run),
        "best_return": max(returns, default=math.nan),
        "imagined_steps": len(run.errors.observation),
        "observation_error_before": run.errors_before.observation[-1],
        "observation_error": run.errors.observation[-1],
        "reward_error_before": run.errors_before.reward[-1],
        "reward_error": run.errors.reward[-1],
        "esnr_db": final("esnr_db"),
        "esnr_db_median": median_esnr_db(run),
        "esnr_unbiased_db": final("esnr_unbiased_db"),
        "esnr_unbiased_db_median": _median(e.esnr_unbiased_db for e in run.evaluations),
        "gradient_cosine": final("gradient_cosine"),
        "predicted": final("predicted"),
        "realised": final("realised"),
        **{name: own[name] for name in _COSTS},
    }


def _cells(row: dict[str, Any]) -> list[str]:
    def two(first: str, second: str, form: Callable[[float], str]) -> str:
        return f"{form(row[first])} / {form(row[second])}"

    counted = f"{row['seeds']}" if row["seeds"] == row["seeds_with_return"] else f"{row['seeds_with_return']} of {row['seeds']}"
    interval = f" [{row['return_low']:.0f}, {row['return_high']:.0f}]" if math.isfinite(row["return_low"]) else ""
    return [
        row["task"],
        row["label"],
        counted,
        "yes" if row["detach"] else "no",
        _whole(row["return"]) + interval,
        _whole(row["best_return"]),
        two("observation_error_before", "observation_error", _short),
        two("reward_error_before", "reward_error", _short),
        two("esnr_db", "esnr_db_median", _tenth),
        two("esnr_unbiased_db", "esnr_unbiased_db_median", _tenth),
        _short(row["gradient_cosine"]),
        two("predicted", "realised", _tenth),
        _whole(row["dynamics_evaluations"]),
        _whole(row["field_evaluations"]),
        *(_whole(row[name]) for name in ("wm_seconds", "policy_seconds", "cpu_seconds")),
        str(row["skipped"]),
        str(int(row["stopped"])),
    ]


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def _tenth(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else MISSING


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else MISSING
