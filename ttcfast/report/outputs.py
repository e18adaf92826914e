"""What a run leaves in its folder: ``metrics.json``, ``summary.csv``, ``config.json``, ``table.md``, ``fields.npz``, figures, logs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.results import MethodResult
from ttcfast.evaluation.sweep import Sweep
from ttcfast.runtime.files import atomic_write, write_csv, write_json
from ttcfast.runtime.logs import RunLog

from . import fields
from .fields import write_fields
from .figures import (
    drift_against_branching,
    drift_against_time,
    error_against_branching,
    error_against_time,
    field_panels,
    gain_histogram,
    save,
)
from .table import markdown, metrics, summary_rows


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
        out: folder; made when missing.
        evaluation, sweep: what was measured; a sweep of None leaves its two figures out.
        horizons: steps of the table's error columns.
        provenance: of ``runtime.provenance.record``; its configuration becomes ``config.json`` and all of it part of ``metrics.json``.
        times: ``[K+1]`` instants of the steps, for the titles of the field panels.

    Returns:
        The figures' paths.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    write_json(out / "config.json", provenance)
    write_json(out / "metrics.json", {**metrics(evaluation, sweep, horizons), "provenance": provenance})
    write_csv(out / "summary.csv", summary_rows(evaluation, horizons))
    with atomic_write(out / "table.md") as file:
        file.write(markdown(evaluation, horizons))
    chosen = shown_method(evaluation)
    if chosen is not None and evaluation.shown:
        write_fields(out / fields.FILE, evaluation, chosen, times=times)
    else:
        (out / fields.FILE).unlink(missing_ok=True)  # of an earlier run in this folder
    paths = []
    for name, draw in figures(evaluation, sweep, times):
        paths.append(out / "figures" / f"{name}.png")
        save(draw(), paths[-1])
    return paths


def figures(evaluation: Evaluation, sweep: Sweep | None, times: Tensor | None = None) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and maker of every figure of a run; made one at a time, so that only one is held."""
    yield "error_time", partial(error_against_time, evaluation)
    yield "drift_time", partial(drift_against_time, evaluation)
    yield "gain_histogram", partial(gain_histogram, evaluation)
    chosen = shown_method(evaluation)
    if chosen is not None:
        for position, problem in enumerate(evaluation.shown):
            yield f"fields_problem{problem}", partial(field_panels, evaluation, chosen, position=position, times=times)
    if sweep is not None:
        yield "error_branching", partial(error_against_branching, sweep)
        yield "drift_branching", partial(drift_against_branching, sweep)


def shown_method(evaluation: Evaluation) -> MethodResult | None:
    """Whose fields are drawn: the last reward's choice (a learned one stands behind ARM), with projection where there is one."""
    if evaluation.baseline.trajectory is None:
        return None
    others = ("deterministic", "random", "mean", "finetuned")
    honest = [r for r in evaluation.results if r.method not in others and "oracle" not in r.method and r.trajectory is not None]
    return next((r for r in reversed(honest) if r.projected), honest[-1] if honest else None)


def log_outputs(log: RunLog, evaluation: Evaluation, paths: Sequence[Path]) -> None:
    """One log entry per rollout step with every method's error and drift, then the gains' histograms and the figures."""
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
    for result in evaluation.results[1:]:
        log.histogram(f"gain/{tag(result)}", evaluation.gain(result).per_problem.tolist(), evaluation.steps)
    for path in paths:
        log.figure(f"figures/{path.stem}", path, evaluation.steps)


def tag(result: MethodResult) -> str:
    """A method's name for logs, without blanks: ``arm``, ``arm_projected``."""
    return re.sub(r"\W+", "_", result.method) + ("_projected" if result.projected else "")
