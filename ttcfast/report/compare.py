"""The logic of ``ttcfast report``: the runs of ``demo`` and ``run_ttc`` side by side, from the numbers they left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import atomic_write, output_folder, write_csv
from ttcfast.ttc.method_result import LABELS

_COLUMNS = ("run", "method", "B", "rollout MSE", "gain %", "improved %", "drift", "s", "model evals")


@dataclass(frozen=True)
class CompareConfig:
    """What ``ttcfast report`` compares.

    Args:
        runs: folders that ``ttcfast demo`` or ``ttcfast run_ttc`` wrote.
        out: folder for ``report.csv`` and ``report.md``.
    """

    runs: tuple[str, ...] = ("runs/demo",)
    out: str = "runs/report"

    def __post_init__(self) -> None:
        if not self.runs:
            raise ArgumentError("runs is empty; name at least one folder that ttcfast demo or ttcfast run_ttc wrote")


def compare(config: CompareConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Print one table over all runs, and write it as CSV and Markdown.

    Returns:
        One row per run and method. Gains are against the deterministic rollout of the same run; runs on other problems, or with errors in
        other units, stand in one table but cannot be compared, and a note says so.

    Raises:
        DataError: a run has no ``metrics.json`` or a damaged one. OutputError: the folder cannot be written.
    """
    out = output_folder(config.out)
    runs = [(folder, _read(Path(folder))) for folder in config.runs]
    rows = [_row(folder, method) for folder, run in runs for method in run["methods"]]
    notes = _notes(dict(runs))
    write_csv(out / "report.csv", rows)
    cells = [[_text(row[column]) for column in _COLUMNS] for row in rows]
    with atomic_write(out / "report.md") as file:
        lines = [_COLUMNS, ["---"] * 2 + ["---:"] * (len(_COLUMNS) - 2), *cells]
        file.write("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "".join(f"* {note}\n" for note in notes))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("run", "method") else "right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    console = console or Console()
    console.print(table, width=max(console.width, 140), soft_wrap=True)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    return rows


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "metrics.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        for method in run["methods"]:
            _row("", method)
        return run
    except OSError as error:
        raise DataError(
            f"{folder} holds no readable metrics.json ({error.strerror}); give a folder that ttcfast demo or run_ttc wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged or of another version ({error}); make the run again") from error


def _row(folder: str, method: Mapping[str, Any]) -> dict[str, Any]:
    drifts = [method[f"drift_{quantity}"] for quantity in ("mass", "momentum", "energy")]
    return {
        "run": folder,
        "method": LABELS.get(method["method"], method["method"]) + (" + projection" if method["projection"] else ""),
        "B": method["branching_factor"],
        "rollout MSE": method["rollout_mse"],
        "gain %": method["gain_mean_percent"],
        "improved %": method["gain_improved_percent"],
        "drift": None if None in drifts else max(drifts),
        "s": method["seconds"],
        "model evals": method["evaluations"],
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
