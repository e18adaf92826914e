"""The table that compares the arms of ``ttcfast train_wm``, and the ranking of the arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from ttcfast.evaluation.table import MISSING
from ttcfast.pwm.arms import Arm
from ttcfast.pwm.evaluation.imagination import ImaginationErrors
from ttcfast.pwm.train_wm import ArmResult, Comparison, TrainWMConfig

_KINDS = ("observation", "reward", "latent")


def summary(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one flat row per arm, persistence first, as in ``table.csv``."""
    last = len(comparison.persistence.reward)
    still = _errors([comparison.persistence], last)
    rows: list[dict[str, Any]] = [{"arm": "persistence", "label": "nothing changes", **still}]
    for name, runs in by_arm(comparison).items():
        rows.append(
            {
                "arm": name,
                "label": Arm(name).label,
                "seeds": len(runs),
                "parameters": runs[0].parameters,
                "base_parameters": runs[0].base_parameters,
                "parameter_gap_percent": 100 * runs[0].parameter_gap,
                "dynamics_parameters": runs[0].dynamics_parameters,
                "dynamics_gap_percent": 100 * runs[0].dynamics_gap,
                "evaluations_per_step": runs[0].evaluations,
                "training_evaluations": fmean(run.training_evaluations for run in runs),
                "updates": fmean(run.steps for run in runs),
                **_errors([run.errors for run in runs], last),
                "simplex_distance": fmean(run.errors.simplex_distance for run in runs),
                "seconds": fmean(run.seconds for run in runs),
                "cpu_seconds": fmean(run.cpu_seconds for run in runs),
                "esnr_db": fmean(run.esnr_db for run in runs),
                "skipped_updates": sum(run.skipped for run in runs),
                "stopped_runs": sum(run.stopped for run in runs),
            }
        )
    return rows


def run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one flat row per run, as in ``runs.csv``."""
    last = len(comparison.persistence.reward)
    rows = []
    for run in comparison.runs:
        errors = {k: v for k, v in _errors([run.errors], last).items() if not k.endswith("_se")}
        rows.append({**{k: v for k, v in asdict(run).items() if k != "errors"}, **errors, "simplex_distance": run.errors.simplex_distance})
    return rows


def by_arm(comparison: Comparison) -> dict[str, list[ArmResult]]:
    """Group the runs by arm, in order."""
    found: dict[str, list[ArmResult]] = {}
    for run in comparison.runs:
        found.setdefault(run.arm, []).append(run)
    return found


def order(comparison: Comparison, kind: str = "observation") -> list[str]:
    """Rank the arms by their error of ``kind`` after the last step, smallest first; "~" joins neighbours that cannot be told apart.

    Two arms are told apart if their means differ by more than twice the standard error of the difference.
    """
    last = len(comparison.persistence.reward)
    runs = by_arm(comparison)
    values = {name: [getattr(run.errors, kind)[last - 1] for run in found] for name, found in runs.items()}
    ranked = sorted(values, key=lambda name: fmean(values[name]) if _all_finite(values[name]) else math.inf)
    told = [Arm(ranked[0]).label]
    for before, name in pairwise(ranked):
        told += ["<" if _apart(values[before], values[name]) else "~", Arm(name).label]
    return told


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the column heads and the text of every cell."""
    last = len(comparison.persistence.reward)
    heads = ["dynamics", "parameters\n(gap)", "evals\n/ step"]
    heads += [f"observation error\n{h} step{'s' * (h > 1)}" for h in (1, last)]
    heads += [f"reward error\nstep {h}" for h in (1, last)]
    heads += [f"own latent\n{h} step{'s' * (h > 1)}" for h in (1, last)]
    heads += ["\nunread", "ESNR\ndB", "train\nevals", "CPU s"]
    return heads, [_cells(row, last) for row in summary(comparison)]


def explanation(comparison: Comparison, config: TrainWMConfig) -> list[str]:
    """Return the meaning of the columns, followed by the ranking of the arms."""
    last, (trained, held) = len(comparison.persistence.reward), comparison.episodes
    lines = [
        f"Mean over {len(config.seeds)} seeds ± its standard error. {config.steps} updates of {config.batch} windows of "
        f"{config.horizon} steps, {trained} episodes; measured on {comparison.windows} windows of {last} steps, {held} held-out episodes.",
        "observation error: between what a linear probe, fitted alike to every model, reads from the imagined latent and from the encoding "
        "of the truth, in units of the observation's variance. unread: what encoder and probe lose of an observation.",
        "reward error: in units of the reward's variance. own latent: in units of the variance of the model's own latents, not comparable "
        "between models. nothing changes: copies the first observation and reward.",
        "evals / step: evaluations of the dynamics network per imagined step. train evals: those of training, a batch counting as one.",
    ]
    if config.esnr_microbatches:
        each = config.batch // config.esnr_microbatches
        lines.append(
            f"ESNR: raw, of the loss's gradient at the end of training, from {config.esnr_microbatches} microbatches of {each} windows."
        )
    lines += [
        f"Order by the {kind} error after {last} steps (~: within two standard errors of the seeds): {' '.join(order(comparison, kind))}."
        for kind in ("observation", "reward")
    ]
    skipped, stopped = sum(run.skipped for run in comparison.runs), sum(run.stopped for run in comparison.runs)
    if skipped or stopped:
        lines.append(f"The sanity checks skipped {skipped} updates and stopped {stopped} runs; runs.csv says whose.")
    return lines


def _errors(errors: Sequence[ImaginationErrors], last: int) -> dict[str, Any]:
    """Return means and standard errors of the errors at the first and the last step, and of the unread part."""
    found = {f"{kind}_error_{h}": [c[h - 1] for e in errors if (c := getattr(e, kind))] for kind in _KINDS for h in (1, last)}
    columns: dict[str, Any] = {}
    for name, values in {**found, "unread": [e.unread for e in errors]}.items():
        columns[name], columns[f"{name}_se"] = _spread(values) if values else (math.nan, math.nan)
    return columns


def _cells(row: dict[str, Any], last: int) -> list[str]:
    def error(name: str) -> str:
        return _with_spread(row[name], row[f"{name}_se"])

    errors = [error(f"{kind}_error_{h}") for kind in _KINDS for h in (1, last)]
    if row["arm"] == "persistence":
        return [row["label"], MISSING, "0", *errors, MISSING, MISSING, MISSING, MISSING]
    lost = f" ({row['stopped_runs']} stopped)" if row["stopped_runs"] else ""
    return [
        row["label"] + lost,
        f"{row['parameters']:,} ({row['parameter_gap_percent']:+.2f} %)",
        str(row["evaluations_per_step"]),
        *errors,
        error("unread"),
        f"{row['esnr_db']:.1f}" if math.isfinite(row["esnr_db"]) else MISSING,
        f"{row['training_evaluations']:,.0f}",
        f"{row['cpu_seconds']:.0f}",
    ]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean over random seeds and its standard error, which is NaN for a single one."""
    if not _all_finite(values):
        return math.nan, math.nan
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _apart(a: Sequence[float], b: Sequence[float]) -> bool:
    if not (_all_finite(a) and _all_finite(b)):
        return _all_finite(a) != _all_finite(b)
    if min(len(a), len(b)) < 2:
        return False
    return abs(fmean(a) - fmean(b)) > 2 * math.sqrt(stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b))


def _all_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _with_spread(mean: float, spread: float) -> str:
    """Format ``0.0312 ± 0.0041``: three digits, two for the spread."""
    if not math.isfinite(mean):
        return MISSING
    return f"{mean:.3g}" + (f" ± {spread:.2g}" if math.isfinite(spread) else "")
