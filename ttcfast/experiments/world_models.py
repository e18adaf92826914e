"""The logic of ``ttcfast train_wm``: trains the arms and writes their table and figure."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from ttcfast.evaluation.table import markdown_table, print_with_notes, rich_table
from ttcfast.pwm.train_wm import Comparison, TrainWMConfig, train_wm
from ttcfast.report.figures.endpoint_error import endpoint_error
from ttcfast.report.figures.style import save
from ttcfast.report.world_models import cells, explanation, run_rows, summary
from ttcfast.runtime import provenance
from ttcfast.runtime.files import atomic_write, output_folder, strict, write_csv, write_json

if TYPE_CHECKING:
    from rich.console import Console


def run_train_wm(config: TrainWMConfig, console: Console | None = None) -> Comparison:
    """Train and measure every arm, print the table, and write it, the numbers of every run and the figure to ``config.out``.

    Raises:
        OutputError: The folder cannot be written. Others as ``ttcfast.pwm.train_wm.train_wm``.
    """
    out = output_folder(config.out)
    comparison = train_wm(config)
    rows = summary(comparison)
    write_csv(out / "table.csv", strict(rows))
    write_csv(out / "runs.csv", strict(run_rows(comparison)))
    write_json(out / "metrics.json", {**asdict(comparison), "summary": rows, "provenance": provenance.record(config)})
    (heads, texts), notes = cells(comparison), explanation(comparison, config)
    with atomic_write(out / "table.md") as file:
        file.write(markdown_table(heads, texts, notes))
    save(endpoint_error(comparison), out / "endpoint_error.png")
    print_with_notes(rich_table(heads, texts), notes, console)
    return comparison
