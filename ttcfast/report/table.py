"""One table of all methods: on the terminal, as Markdown, as ``summary.csv`` and, with every step and problem, as ``metrics.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.results import Gain, MethodResult
from ttcfast.evaluation.sweep import Sweep
from ttcfast.runtime.files import strict
from ttcfast.runtime.terminal import plain_console, print_whole

QUANTITIES = ("mass", "momentum", "energy")
MISSING = "–"


def summary_rows(evaluation: Evaluation, horizons: Sequence[int]) -> list[dict[str, Any]]:
    """One flat row per method: what ``summary.csv`` holds. Values that are not finite are None (an empty cell).

    ``mse_step_<h>`` is the mean over problems at step h, None beyond the truth; ``rollout_mse`` the mean over steps 1..K too; both in
    normalised units. Gains are in percent of the reference's rollout_mse per problem, as measured: also where the table says "none".
    ``drift_*`` is the mean relative drift after the last step; ``seconds`` and ``evaluations`` are for all problems together.
    """
    return [strict(_row(evaluation, result, horizons)) for result in evaluation.results]


def metrics(evaluation: Evaluation, sweep: Sweep | None, horizons: Sequence[int]) -> dict[str, Any]:
    """Everything measured, as plain values for ``metrics.json``: the summary, every step, every problem, the sweep, the notes."""
    methods = []
    for row, result in zip(summary_rows(evaluation, horizons), evaluation.results, strict=True):
        over_projected = evaluation.gain_over_projected(result)
        per_problem = {
            "rollout_mse": result.rollout_error,
            "gain_percent": evaluation.gain(result).per_problem,
            "gain_over_projected_percent": None if over_projected is None else over_projected.per_problem,
            "blown_up": result.blown_up,
        }
        drift = {quantity: value.mean(0) for quantity, value in result.drift.items()}
        methods.append({**row, "mse_by_step": result.mse.mean(0), "drift_by_step": drift, "per_problem": per_problem})
    out = {
        "problems": evaluation.problems,
        "steps": evaluation.steps,
        "scored_steps": evaluation.scored,
        "horizons": list(horizons),
        "error_units": "mean squared error; each channel divided by its scale" if evaluation.scale is not None else "physical units",
        "scale": evaluation.scale,
        "methods": methods,
        "persistence_mse_by_step": evaluation.persistence.mean(0),
        "truth_drift_by_step": {quantity: value.mean(0) for quantity, value in evaluation.truth_drift.items()},
        "sweep": None if sweep is None else _sweep(sweep),
        "notes": list(evaluation.notes),
    }
    return strict(out)


def cells(evaluation: Evaluation, horizons: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Column heads and the text of every cell, for a reader: short numbers, "none" for a gain that is none, what blew up."""
    heads = ["method", *(f"MSE at\nstep {h}" for h in horizons), "gain %\nmean / median", "improved\n%"]
    heads += ["gain % over\ndet. + proj.", "drift", "\ns", "model\nevals"]
    return heads, [_cells(evaluation, result, horizons) for result in evaluation.results]


def rich_table(evaluation: Evaluation, horizons: Sequence[int], title: str | None = None) -> Table:
    """The table for a terminal of about 120 columns: the form with projection stands indented under the method."""
    heads, rows = cells(evaluation, horizons)
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True, vertical="bottom")
    for result, row in zip(evaluation.results, rows, strict=True):
        above = result.projected and evaluation.find(result.method) is not None
        table.add_row("  " + row[0][row[0].index("+ projection") :] if above else row[0], *row[1:])
    return table


def print_table(evaluation: Evaluation, horizons: Sequence[int], title: str | None = None, console: Console | None = None) -> None:
    """Print the table and what its columns mean. Never narrower than the table, so that a log keeps whole lines."""
    console = plain_console(console)
    print_whole(console, rich_table(evaluation, horizons, title))
    for line in explanation(evaluation):
        console.print(line, style="dim", soft_wrap=True)


def markdown(evaluation: Evaluation, horizons: Sequence[int]) -> str:
    """The same table in Markdown, for a README, followed by what its columns mean."""
    heads, rows = cells(evaluation, horizons)
    lines = [[head.replace("\n", " ") for head in heads], ["---"] + ["---:"] * (len(heads) - 1), *rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return body + "\n\n" + "\n".join(f"* {line}" for line in explanation(evaluation)) + "\n"


def explanation(evaluation: Evaluation) -> list[str]:
    """What the columns mean, and the evaluation's own notes."""
    unit = "each channel in units of its training standard deviation" if evaluation.scale is not None else "physical units"
    lines = [
        f"MSE: mean over {evaluation.problems} problems of the squared error at a step, {unit}.",
        f"gain: SampleGain of each problem over the deterministic rollout, on the error averaged over steps 1 to {evaluation.scored}; "
        '"none" where it is not above 0. improved: share of the problems with a smaller error than the deterministic rollout.',
        f"drift: the largest of the relative drifts of mass, momentum and energy after {evaluation.steps} steps, mean over problems.",
        "s, model evals: seconds and model evaluations for all problems together; one evaluation is one state through the model.",
    ]
    if evaluation.find("oracle") is not None:
        lines.append("oracle: chooses by the true error, which no user has: the ceiling of choosing step by step among these candidates.")
    if evaluation.find("span_oracle") is not None:
        lines.append("span oracle: least squares on the truth in the span of the candidates: the ceiling of combining them.")
    return [*lines, *evaluation.notes]


def _row(evaluation: Evaluation, result: MethodResult, horizons: Sequence[int]) -> dict[str, Any]:
    return {
        "method": result.method,
        "projection": result.projected,
        "branching_factor": result.branching_factor,
        **{f"mse_step_{h}": result.mse_at(h) for h in horizons},
        "rollout_mse": float(result.rollout_error.mean()),
        **_gain_columns("gain", evaluation.gain(result)),
        **_gain_columns("gain_over_projected", evaluation.gain_over_projected(result)),
        **{f"drift_{quantity}": result.final_drift(quantity) for quantity in QUANTITIES},
        "seconds": round(result.seconds, 3),
        "evaluations": result.evaluations,
        "reward_evaluations": result.reward_evaluations,
        "fallbacks": result.fallbacks,
        "resamples": result.resamples,
        "nonfinite_candidates": result.nonfinite,
        "collapsed_steps": result.collapsed,
        "unprojected_steps": result.unprojected,
        "blown_up": int(result.blown_up.sum()),
        "recorded": result.recorded,
    }


def _gain_columns(prefix: str, gain: Gain | None) -> dict[str, float | None]:
    names = ("mean", "median", "standard_error")
    values: dict[str, float | None] = {f"{prefix}_{n}_percent": None if gain is None else getattr(gain, n) for n in names}
    return {**values, f"{prefix}_improved_percent": None if gain is None else gain.improved}


def _sweep(sweep: Sweep) -> dict[str, Any]:
    rows = []
    for result in sweep.results:
        gain = Gain.of(result, sweep.deterministic)
        rows.append(
            {
                "method": result.method,
                "projection": result.projected,
                "branching_factor": result.branching_factor,
                "rollout_mse": float(result.rollout_error.mean()),
                "mse_last_step": result.mse_at(result.steps),
                **_gain_columns("gain", gain),
                **{f"drift_{quantity}": result.final_drift(quantity) for quantity in QUANTITIES},
                "seconds": round(result.seconds, 3),
                "evaluations": result.evaluations,
            }
        )
    return {"problems": sweep.problems, "rows": rows}


def _cells(evaluation: Evaluation, result: MethodResult, horizons: Sequence[int]) -> list[str]:
    lost = int(result.blown_up.sum())
    name = result.name + (f" ({lost}/{evaluation.problems} blew up)" if lost else "") + (" (recorded)" if result.recorded else "")
    errors = [_error(result, h) for h in horizons]
    is_baseline = result is evaluation.baseline
    gain, over = evaluation.gain(result), evaluation.gain_over_projected(result)
    return [
        name,
        *errors,
        "baseline" if is_baseline else _gain(gain),
        MISSING if is_baseline else f"{gain.improved:.0f}",
        MISSING if over is None else "baseline" if result is evaluation.projected_baseline else _gain(over),
        _short(max((result.final_drift(q) for q in QUANTITIES), key=lambda v: -math.inf if math.isnan(v) else v)),
        f"{result.seconds:.1f}",
        str(result.evaluations),
    ]


def _error(result: MethodResult, step: int) -> str:
    if step > result.steps:
        return MISSING
    value = result.mse_at(step)
    return _short(value) if math.isfinite(value) else "blew up"


def _gain(gain: Gain) -> str:
    return f"{_percent(gain.mean)} / {_percent(gain.median)}"


def _percent(value: float) -> str:
    if math.isnan(value):
        return MISSING
    return f"{value:.1f}" if value >= 0.05 else "<0.05" if value > 0 else "none"


def _short(value: float) -> str:
    """Three digits: 0.00812, 1.19, 3.2e-07."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}"
