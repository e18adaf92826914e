"""The table that compares the policies of ``ttcfast protocol``, a row per task and arm."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from ttcfast.evaluation.results import RESAMPLES, bootstrap_interval
from ttcfast.evaluation.table import MISSING
from ttcfast.pwm.arms import Arm
from ttcfast.pwm.policy_result import PolicyResult

_Row = dict[str, Any]
_Column = tuple[str, Callable[[_Row], str]]
_NAMES = ("task", "arm", "seed", "mode", "detach")
_COSTS = (
    *("parameters", "dynamics_gap", "dynamics_evaluations", "field_evaluations", "own_episodes", "environment_steps", "failed"),
    *("wm_seconds", "policy_seconds", "cpu_seconds", "skipped", "stopped"),
)
_ALONG = ("simulator_cosine", "dynamics_lipschitz", "reward_lipschitz", "action_sensitivity", "saturation")


_PUBLIC = Path(__file__).with_name("public_returns.csv")
SUCCESS = 0.9
"""Share of the best published return that makes an episode a success."""


def final_return(run: PolicyResult) -> float:
    """Mean return of the last evaluation, NaN for a run that was stopped before its policy was evaluated."""
    return run.evaluations[-1].mean if run.evaluations else math.nan


def median_esnr_db(run: PolicyResult) -> float:
    """Median over the run, the initial policy left out, of the raw ESNR of the actor's gradient."""
    return _median(e.esnr_db for e in run.evaluations if e.step)


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
    """Return the column heads and the text of every cell of the main table; the first two columns are text."""
    return _columns(_MAIN, results)


def details(results: Sequence[PolicyResult]) -> tuple[list[str], list[list[str]]]:
    """Return those of the second table, with what explains the returns and what they cost."""
    return _columns(_DETAILS, results)


def explanation(results: Sequence[PolicyResult]) -> list[str]:
    """Return the meaning of the columns, and what is missing."""
    steps = ", ".join(map(str, sorted({len(run.errors.observation) for run in results})))
    episodes = ", ".join(map(str, sorted({len(run.evaluations[-1].returns) for run in results if run.evaluations})))
    best = {task: found for task in dict.fromkeys(run.task for run in results) if (found := best_published(task)) is not None}
    wanted = "; ".join(f"{task} {SUCCESS * value:.0f} ({method} {value:.0f})" for task, (value, method) in best.items())
    lines = [
        f"return: of the last policy, mean over seeds of the mean over {episodes or 'no'} episodes, and its 95 % interval over seeds by "
        f"the percentile bootstrap ({RESAMPLES:,} samples). best: mean over seeds of the best evaluation, which is too high by its choice.",
        f"success: share of these episodes with at least {100 * SUCCESS:.0f} % of the best return published for the task "
        f"(public_returns.csv): {wanted or 'none is known for these tasks'}.",
        f"observation error: after {steps} imagined steps of held-out episodes, through a linear probe, in units of the observation's "
        "variance; reward error: of that step, in units of the reward's variance; before and after the policy's training.",
        "ESNR: of the actor's gradient, raw and unbiased, at the last evaluation and as median over the run. cosine: of the "
        "actor's gradient with finite differences of the imagined return, and of the gradient of H actions' return along the first episode "
        "with the simulator's. gradient norm: of the actor's gradient before clipping, in units "
        "of the rewards, median over the updates between the last two evaluations. detach: whether the gradient leaves out the part "
        "through the latents that the policy sees.",
        "value: discounted, of the episodes' first states, by the critic and as earned. evals / step: evaluations of the dynamics network "
        "per imagined step, the measure of equal cost. train evals: those of training, a batch counting as one.",
        "seconds: processor time and wall-clock of all updates. model, policy s: wall-clock of those of world model and policy. skipped: "
        "updates. stopped: runs that the sanity checks ended. runs.csv also has Lipschitz estimates, action sensitivity, saturation and "
        "the agent steps that a run made itself.",
    ]
    if failed := sum(run.failed for run in results):
        lines.append(f"{failed} episodes were dropped, in which the simulator failed; runs.csv says whose.")
    if without := [run for run in results if not math.isfinite(final_return(run))]:
        named = ", ".join(f"{run.task} {run.arm} seed {run.seed}" for run in without)
        lines.append(f"Without a return, and left out of means and intervals: {named}.")
    return lines


@functools.cache
def public_returns() -> tuple[dict[str, str], ...]:
    """Return the rows of ``public_returns.csv``: task, method, environment steps (empty if offline), return and source."""
    with open(_PUBLIC, encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def best_published(task: str) -> tuple[float, str] | None:
    """Return the best published return for a task and whose it is, None where there is none."""
    return max(((float(row["return"]), row["method"]) for row in public_returns() if row["task"] == task), default=None)


def success(run: PolicyResult) -> float:
    """Return the share of the last evaluation's episodes with at least ``SUCCESS`` of the best published return.

    NaN without an episode, or for a task without a published return.
    """
    best, returns = best_published(run.task), run.evaluations[-1].returns if run.evaluations else ()
    return math.nan if best is None or not returns else fmean(value >= SUCCESS * best[0] for value in returns)


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
        "success": success(run),
        "best_return": max(returns, default=math.nan),
        "imagined_steps": len(run.errors.observation),
        "observation_error_before": run.errors_before.observation[-1],
        "observation_error": run.errors.observation[-1],
        "reward_error_before": run.errors_before.reward[-1],
        "reward_error": run.errors.reward[-1],
        "esnr_db": final("esnr_db"),
        "esnr_db_median": median_esnr_db(run),
        "esnr_unbiased_db": final("esnr_unbiased_db"),
        "esnr_unbiased_db_median": _median(e.esnr_unbiased_db for e in run.evaluations if e.step),
        "gradient_cosine": final("gradient_cosine"),
        "gradient_norm": final("gradient_norm"),
        "predicted": final("predicted"),
        "realised": final("realised"),
        **{name: final(name) for name in _ALONG},
        **{name: math.nan if own[name] is None else own[name] for name in _COSTS},
    }


def _columns(columns: Sequence[_Column], results: Sequence[PolicyResult]) -> tuple[list[str], list[list[str]]]:
    rows = summary(results)
    return [head for head, _ in columns], [[text(row) for _, text in columns] for row in rows]


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else MISSING


def _tenth(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else MISSING


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else MISSING


def _of(name: str, form: Callable[[float], str]) -> Callable[[_Row], str]:
    return lambda row: form(row[name])


def _two(first: str, second: str, form: Callable[[float], str]) -> Callable[[_Row], str]:
    return lambda row: f"{form(row[first])} / {form(row[second])}"


def _counted(row: _Row) -> str:
    return f"{row['seeds']}" if row["seeds"] == row["seeds_with_return"] else f"{row['seeds_with_return']} of {row['seeds']}"


def _with_interval(row: _Row) -> str:
    return _whole(row["return"]) + (f" [{row['return_low']:.0f}, {row['return_high']:.0f}]" if math.isfinite(row["return_low"]) else "")


_NAMED: list[_Column] = [("task", lambda row: row["task"]), ("dynamics", lambda row: row["label"])]
_MAIN: list[_Column] = [
    *_NAMED,
    ("seeds", _counted),
    ("detach", lambda row: "yes" if row["detach"] else "no"),
    ("return\n[95 %]", _with_interval),
    ("success", lambda row: f"{100 * row['success']:.0f} %" if math.isfinite(row["success"]) else MISSING),
    ("observation error\nbefore / after", _two("observation_error_before", "observation_error", _short)),
    ("reward error\nbefore / after", _two("reward_error_before", "reward_error", _short)),
    ("seconds\nCPU / wall", lambda row: f"{_whole(row['cpu_seconds'])} / {_whole(row['wm_seconds'] + row['policy_seconds'])}"),
]
_DETAILS: list[_Column] = [
    *_NAMED,
    ("best", _of("best_return", _whole)),
    ("ESNR dB\nlast / median", _two("esnr_db", "esnr_db_median", _tenth)),
    ("unbiased dB\nlast / median", _two("esnr_unbiased_db", "esnr_unbiased_db_median", _tenth)),
    ("cosine, differences\n/ simulator", _two("gradient_cosine", "simulator_cosine", _short)),
    ("gradient\nnorm", _of("gradient_norm", _short)),
    ("value pred.\n/ realised", _two("predicted", "realised", _tenth)),
    ("evals\n/ step", _of("dynamics_evaluations", _whole)),
    ("train\nevals", _of("field_evaluations", _whole)),
    ("model,\npolicy s", _two("wm_seconds", "policy_seconds", _whole)),
    ("skipped\n/ stopped", lambda row: f"{row['skipped']} / {int(row['stopped'])}"),
]
