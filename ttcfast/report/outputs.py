"""Writes the files of a run: metrics, summary, configuration, table, fields, calibration, frontier, figures and logs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ttcfast.evaluation.breakeven import equal_error_columns
from ttcfast.evaluation.calibration import CandidateScores
from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.frontier import Frontier
from ttcfast.evaluation.results import Gain, MethodResult, chooses_by_reward, ratio_interval
from ttcfast.evaluation.speeds import Speeds
from ttcfast.evaluation.sweep import Sweep
from ttcfast.evaluation.table import cells, explanation, markdown_table
from ttcfast.runtime.files import atomic_write, strict, write_csv, write_json
from ttcfast.runtime.logs import RunLog

from . import fields
from .fields import write_fields
from .figures import (
    calibration_figure,
    calibration_rows,
    drift_against_branching,
    drift_against_time,
    error_against_branching,
    error_against_evaluations,
    error_against_seconds,
    error_against_time,
    field_panels,
    gain_histogram,
    save,
)
from .figures.calibration_buckets import comparable
from .figures.style import remove

CALIBRATION, CALIBRATION_TABLE, CALIBRATION_FIGURE = "calibration.json", "calibration.csv", "figures/calibration.png"
FRONTIER, FRONTIER_FIGURE = "frontier.csv", "figures/frontier.png"
BREAKEVEN = "breakeven.json"


def write_outputs(
    out: Path,
    evaluation: Evaluation,
    sweep: Sweep | None,
    horizons: Sequence[int],
    provenance: dict[str, Any],
    *,
    times: Tensor | None = None,
) -> list[Path]:
    """Write the numbers, the table and the figures of a run.

    Args:
        out: Folder, created if missing.
        evaluation: What was measured.
        sweep: The sweep over B; None omits its two figures.
        horizons: Steps of the table's error columns.
        provenance: Record of ``runtime.provenance.record``, written to ``config.json`` and as a part of ``metrics.json``.
        times: ``[K+1]``, times of the steps, for the titles of the field panels.

    Returns:
        The paths of the figures.

    Raises:
        OutputError: The folder cannot be written or the disk is full.
    """
    write_json(out / "config.json", provenance)
    write_json(out / "metrics.json", {**metrics(evaluation, sweep, horizons), "provenance": provenance})
    write_csv(out / "summary.csv", summary_rows(evaluation, horizons))
    with atomic_write(out / "table.md") as file:
        file.write(markdown_table(*cells(evaluation, horizons), explanation(evaluation)))
    chosen = shown_method(evaluation)
    if chosen is not None and evaluation.shown:
        channel, quantity, _ = evaluation.picture
        write_fields(out / fields.FILE, evaluation, chosen, times=times, channel=channel, quantity=quantity)
    else:
        (out / fields.FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    paths = []
    for name, draw in figures(evaluation, sweep, times):
        paths.append(out / "figures" / f"{name}.png")
        save(draw(), paths[-1])
    return paths


def summary_rows(evaluation: Evaluation, horizons: Sequence[int]) -> list[dict[str, Any]]:
    """Return one flat row per method, as in ``summary.csv``. Non-finite values are None (an empty cell).

    ``mse_step_<h>`` is the mean over problems at step h, None beyond the truth, with ``_low`` and ``_high`` the ends of its 95 % interval
    (``bootstrap_interval``); ``rollout_mse`` is the mean over steps 1..K, too; both in
    normalised units. Gains are in percent of the reference's ``rollout_mse`` per problem, as measured even where the table says "none".
    ``drift_*`` is the mean relative drift after the last step; ``seconds`` and ``evaluations`` are for all problems together;
    ``peak_bytes`` is the most memory held while the method ran, None where it is not known, and ``chunk_size`` the most candidates made at
    once, None for all of a step.
    """
    return [strict(_row(evaluation, result, horizons)) for result in evaluation.results]


def metrics(evaluation: Evaluation, sweep: Sweep | None, horizons: Sequence[int]) -> dict[str, Any]:
    """Return all measurements as plain values for ``metrics.json``: summary, steps, problems, sweep and notes."""
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
        equal = equal_error_columns(evaluation, result, horizons)
        over = {tag(other): _over(result, other, horizons) for other in _references(evaluation)}
        methods.append(
            {**row, **equal, "over": over, "mse_by_step": result.mse.mean(0), "drift_by_step": drift, "per_problem": per_problem}
        )
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


def _references(evaluation: Evaluation) -> list[MethodResult]:
    """Return the rows beside which a gain is stated: the deterministic rollout, symmetries, correctors and solvers."""
    known = re.compile("deterministic|symmetry_mean|surrogate_solver|.*_corrector|solver .*")
    return [result for result in evaluation.results if known.fullmatch(result.method)]


def _over(result: MethodResult, other: MethodResult, horizons: Sequence[int]) -> dict[str, list[float]]:
    """Return the ratio of two rows' errors and its 95 % interval by step (``ratio_interval``)."""
    last = min(result.steps, other.steps)
    return {str(h): list(ratio_interval(result.mse[:, h], other.mse[:, h])) for h in horizons if h <= last}


def write_calibration(out: Path, found: CandidateScores | None) -> list[Path]:
    """Write scores and errors (``calibration.json``, non-finite values as null), the table of their buckets and the figure.

    A reward without a usable score is in the first file alone. None, of a run without calibration, removes what an earlier run left.

    Returns:
        The figure's path, if there is a figure.

    Raises:
        OutputError: A file cannot be written.
    """
    for name in (CALIBRATION, CALIBRATION_TABLE):
        (out / name).unlink(missing_ok=True)
    remove(out / CALIBRATION_FIGURE)
    if found is None:
        return []
    held: dict[str, Any] = {"problems": found.problems, "steps": found.steps, "errors": found.errors, "scores": dict(found.scores)}
    write_json(out / CALIBRATION, held)
    usable = {name: given for name, given in found.scores.items() if comparable(given, found.errors)}
    if not usable:
        return []
    write_csv(out / CALIBRATION_TABLE, calibration_rows(usable, found.errors))
    save(calibration_figure(usable, found.errors), out / CALIBRATION_FIGURE, dpi=100)  # up to five rows: at 150 the run would wait for it
    return [out / CALIBRATION_FIGURE]


def write_frontier(out: Path, frontier: Frontier | None) -> list[Path]:
    """Write ``frontier.csv``, one row per search, reward and number of evaluations, and the figure, whose path is returned.

    None, of a run without a frontier, removes what an earlier run left.
    """
    if frontier is None:
        (out / FRONTIER).unlink(missing_ok=True)
        remove(out / FRONTIER_FIGURE)
        return []
    write_csv(out / FRONTIER, frontier.rows())
    save(error_against_evaluations(frontier), out / FRONTIER_FIGURE)
    return [out / FRONTIER_FIGURE]


def write_breakeven(out: Path, speeds: Speeds | None) -> None:
    """Write ``breakeven.json``, the seconds per frame of surrogate and solver; None, of a run that timed none, removes an earlier one."""
    if speeds is None:
        (out / BREAKEVEN).unlink(missing_ok=True)
    else:
        write_json(out / BREAKEVEN, speeds.record())


def figures(evaluation: Evaluation, sweep: Sweep | None, times: Tensor | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Yield name and maker of every figure of a run, so that only one figure is held at a time."""
    yield "error_time", partial(error_against_time, evaluation)
    yield "error_seconds", partial(error_against_seconds, evaluation)
    if evaluation.quantities:
        yield "drift_time", partial(drift_against_time, evaluation)
    yield "gain_histogram", partial(gain_histogram, evaluation)
    chosen = shown_method(evaluation)
    if chosen is not None:
        channel, quantity, extent = evaluation.picture
        shown: dict[str, Any] = {"channel": channel, "quantity": quantity, "extent": extent, "times": times}
        for position, problem in enumerate(evaluation.shown):
            yield f"fields_problem{problem}", partial(field_panels, evaluation, chosen, position=position, **shown)
    if sweep is not None:
        yield "error_branching", partial(error_against_branching, sweep)
        if sweep.quantities:
            yield "drift_branching", partial(drift_against_branching, sweep)


def shown_method(evaluation: Evaluation) -> MethodResult | None:
    """Return the method whose fields are drawn: the last reward's (a learned one follows ARM), with projection if there is one."""
    if evaluation.baseline.trajectory is None:
        return None
    honest = [r for r in evaluation.results if chooses_by_reward(r.method) and r.trajectory is not None]
    return next((r for r in reversed(honest) if r.projected), honest[-1] if honest else None)


def log_outputs(log: RunLog, evaluation: Evaluation, paths: Sequence[Path]) -> None:
    """Log every method's error and drift per rollout step, then histograms of the gains and the figures."""
    for step in range(1, evaluation.steps + 1):
        entry: dict[str, float] = {}
        for result in evaluation.results:
            name = tag(result)
            if step <= result.steps:
                entry[f"mse/{name}"] = result.mse_at(step)
            for quantity, value in result.drift.items():
                if step < value.shape[1]:
                    entry[f"drift_{quantity}/{name}"] = float(value[:, step].mean())
        log.log(entry, step)
    summary: dict[str, float] = {}
    for result in evaluation.results:
        gain = evaluation.gain(result)
        summary |= {f"gain_mean/{tag(result)}": gain.mean, f"improved/{tag(result)}": gain.improved}
    log.log(summary, evaluation.steps)
    for result in evaluation.rollouts[1:]:
        log.histogram(f"gain/{tag(result)}", evaluation.gain(result).per_problem.tolist(), evaluation.steps)
    for path in paths:
        log.figure(f"figures/{path.stem}", path, evaluation.steps)


def tag(result: MethodResult) -> str:
    """Return a method's name for logs, without blanks: ``arm``, ``arm_projected``."""
    return re.sub(r"\W+", "_", result.method) + ("_projected" if result.projected else "")


def _row(evaluation: Evaluation, result: MethodResult, horizons: Sequence[int]) -> dict[str, Any]:
    return {
        "method": result.method,
        "projection": result.projected,
        "branching_factor": result.branching_factor,
        **{f"mse_step_{h}{end}": value for h in horizons for end, value in _at(result, h)},
        "rollout_mse": float(result.rollout_error.mean()),
        **_gain_columns("gain", evaluation.gain(result)),
        **_gain_columns("gain_over_projected", evaluation.gain_over_projected(result)),
        **{f"drift_{quantity}": result.final_drift(quantity) for quantity in evaluation.quantities},
        **_variances(evaluation, result),
        "seconds": round(result.seconds, 3),
        "evaluations": result.evaluations,
        "reward_evaluations": result.reward_evaluations,
        "solver_steps": result.solver_steps,
        "peak_bytes": result.peak_bytes,
        "chunk_size": result.chunk_size,
        "fallbacks": result.fallbacks,
        "resamples": result.resamples,
        "nonfinite_candidates": result.nonfinite,
        "collapsed_steps": result.collapsed,
        "unprojected_steps": result.unprojected,
        "blown_up": int(result.blown_up.sum()),
        "recorded": result.recorded,
    }


def _variances(evaluation: Evaluation, result: MethodResult) -> dict[str, float | None]:
    """Return the variance at the last scored step over the truth's, in octaves of wavelength, the longest first."""
    truth = evaluation.truth_variances
    if truth is None:
        return {}
    ours = torch.full_like(truth, torch.nan) if result.variances is None else result.variances
    return {f"variance_octave_{band}_over_truth": float(value) for band, value in enumerate(ours.mean(0) / truth.mean(0))}


def _at(result: MethodResult, step: int) -> list[tuple[str, float]]:
    """Return the suffixes and values of the columns of the error at a step: the mean, and the ends of its 95 % interval."""
    return list(zip(("", "_low", "_high"), (result.mse_at(step), *result.interval_at(step)), strict=True))


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
                **{f"drift_{quantity}": result.final_drift(quantity) for quantity in sweep.quantities},
                "seconds": round(result.seconds, 3),
                "evaluations": result.evaluations,
            }
        )
    return {"problems": sweep.problems, "rows": rows}
