"""The logic of ``ttcfast report``: compares finished runs in one table and on one page."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttcfast.evaluation.results import LABELS
from ttcfast.evaluation.table import markdown_table, rich_table
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import atomic_write, output_folder, write_csv
from ttcfast.runtime.terminal import fits, plain_console, print_whole

from .page.methods import megabytes, quantities_of
from .page.page import write_page
from .page.runs import guarded, load

logger = logging.getLogger(__name__)
PAGE = "report.html"
_COLUMNS = ("run", "method", "B", "rollout MSE", "gain %", "improved %", "drift", "s", "model evals", "reward evals", "peak MB")
_KNOWN_OF_SOME = ("drift", "peak MB")
_DROPPED = ("peak MB", "reward evals", "model evals", "s", "drift", "improved %", "B")  # on a narrow terminal, in this order


@dataclass(frozen=True)
class CompareConfig:
    """Configuration of ``ttcfast report``.

    Args:
        runs: Folders written by ``demo``, ``run_ttc`` or a training, or folders that contain such folders (a multirun).
        out: Folder for ``report.html``, ``report.csv`` and ``report.md``.
    """

    runs: tuple[str, ...] = ("runs/demo",)
    out: str = "runs/report"

    def __post_init__(self) -> None:
        if not self.runs:
            raise ArgumentError("runs is empty; name at least one folder that ttcfast demo, run_ttc or train_* wrote")


def compare(config: CompareConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Print one table of all runs that compare methods, write it as CSV and Markdown, and write an HTML page of all runs.

    Returns:
        One row per run and method; none if every run is a training. Gains are over the deterministic rollout of the same run. A note says
        so if runs cannot be compared because their problems or units of error differ.

    Raises:
        DataError: A folder is not a run, or its numbers are missing or damaged.
        ArgumentError: A run is named twice.
        OutputError: The folder cannot be written.
    """
    out = output_folder(config.out)
    runs, left_out = load(config.runs)
    compared = [run for run in runs if run.compares_methods]
    rows = [
        row
        for run in compared
        for row in guarded(run.folder, lambda run: [_row(str(run.folder), method) for method in run.metrics["methods"]], run)
    ]
    notes = [*left_out, *(_notes({str(run.folder): run.metrics for run in compared}) if compared else [])]
    if rows:
        _write_table(out, rows, notes)
        _print_table(rows, notes, plain_console(console), out)
    refused = write_page(out / PAGE, runs, rows, notes)
    if refused:
        logger.warning("%s is full; left out: %s", out / PAGE, ", ".join(refused))
    return rows


def _write_table(out: Path, rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    write_csv(out / "report.csv", rows)
    with atomic_write(out / "report.md") as file:
        file.write(markdown_table(_columns(rows), _cells(rows, _columns(rows)), notes, text_columns=2))


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of the table, without the drift where nothing is conserved and the memory where it is not known."""
    return [column for column in _COLUMNS if column not in _KNOWN_OF_SOME or any(row[column] is not None for row in rows)]


def _print_table(rows: Sequence[Mapping[str, Any]], notes: Sequence[str], console: Console, out: Path) -> None:
    left_out: list[str] = []
    columns = _columns(rows)
    table = _table(rows, columns)
    for column in (column for column in _DROPPED if column in columns):
        if fits(console, table):
            break
        left_out.append(column)
        table = _table(rows, [c for c in columns if c not in left_out])
    print_whole(console, table)
    if left_out:
        console.print(f"Left out for want of width: {', '.join(left_out)}; see {out / 'report.csv'} or {out / PAGE}.", soft_wrap=True)
    for note in notes:
        console.print(note, soft_wrap=not console.is_terminal)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> Table:
    return rich_table(columns, _cells(rows, columns), text_columns=2)


def _cells(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    return [[_text(row[column]) for column in columns] for row in rows]


def _row(folder: str, method: Mapping[str, Any]) -> dict[str, Any]:
    drifts = [method[f"drift_{quantity}"] for quantity in quantities_of(method)]
    return {
        "run": folder,
        "method": LABELS.get(method["method"], method["method"]) + (" + projection" if method["projection"] else ""),
        "B": method["branching_factor"],
        "rollout MSE": method["rollout_mse"],
        "gain %": method["gain_mean_percent"],
        "improved %": method["gain_improved_percent"],
        "drift": None if None in drifts else max(drifts, default=None),
        "s": method["seconds"],
        "model evals": method["evaluations"],
        "reward evals": method.get("reward_evaluations"),
        "peak MB": megabytes(method),
    }


def _notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = ["rollout MSE: mean over problems and scored steps. gain, improved: against the deterministic rollout of the same run."]
    for name, what in (("problems", "numbers of problems"), ("scored_steps", "scored steps"), ("scale", "units of the error")):
        held = {folder: run.get(name) for folder, run in runs.items()}
        if len({json.dumps(value) for value in held.values()}) > 1:
            notes.append(f"The runs differ in {what}: compare their gains with care, and their errors not at all.")
    return notes


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
