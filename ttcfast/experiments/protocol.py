"""The logic of ``ttcfast protocol``: writes the tables, the figures and the verdict of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ttcfast.evaluation.table import markdown_table, print_with_notes, rich_table
from ttcfast.pwm.policy_result import PolicyResult
from ttcfast.pwm.protocol import ProtocolConfig
from ttcfast.report.figures.policies import policy_figures
from ttcfast.report.figures.style import save
from ttcfast.report.policies import cells, details, explanation, run_rows, summary
from ttcfast.report.verdict import sentences
from ttcfast.runtime import provenance
from ttcfast.runtime.files import atomic_write, output_folder, strict, write_csv, write_json

if TYPE_CHECKING:
    from rich.console import Console


def write_protocol(config: ProtocolConfig, results: Sequence[PolicyResult], console: Console | None = None) -> None:
    """Print the tables of ``results`` and the verdict, and write them, the numbers of every run and the figures to ``config.out``.

    Raises:
        OutputError: The folder cannot be written.
    """
    out = output_folder(config.out)
    rows, told = summary(results), sentences(results)
    write_csv(out / "table.csv", strict(rows))
    write_csv(out / "runs.csv", strict(run_rows(results)))
    found = {"runs": [asdict(run) for run in results], "summary": rows, "verdict": told}
    write_json(out / "metrics.json", {**found, "provenance": provenance.record(config)})
    main, more, notes = cells(results), details(results), [*explanation(results), *told]
    with atomic_write(out / "table.md") as file:
        file.write(markdown_table(*main, [], text_columns=2) + markdown_table(*more, notes, text_columns=2))
    for name, draw in policy_figures(results):
        save(draw(), out / "figures" / f"{name}.png")
    print_with_notes(rich_table(*main, text_columns=2), [], console)
    print_with_notes(rich_table(*more, text_columns=2), notes, console)
