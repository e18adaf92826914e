"""The table of all methods, and the printing and writing of tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ttcfast.runtime.terminal import least_width, plain_console, print_whole

from .results import RESAMPLES, Gain, MethodResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .evaluate import Evaluation

MISSING = "–"
WIDTH = 100
"""Characters of a table that does not go to a terminal."""
NAMES = 22
"""Characters below which names do not wrap."""
MEGABYTE = 1_000_000
PEAK = (
    "peak MB: most memory held while the method ran: on a GPU by tensors, on a CPU by the whole process, with the program, the data and "
    "what earlier rows left, such as a compiler."
)


def print_table(
    evaluation: Evaluation,
    horizons: Sequence[int],
    title: str | None = None,
    console: Console | None = None,
    *,
    only: Sequence[MethodResult] | None = None,
) -> None:
    """Print the table and the meaning of its columns; rows with projection are indented under their method.

    Long names wrap. Where the numbers do not fit a terminal, or ``WIDTH`` characters of a pipe or file, whole columns are left out, and a
    note names them; a number is never cut.

    Args:
        evaluation: What to show.
        horizons: Steps of the error columns.
        title: Title above the table.
        console: Where to print; None prints to stdout.
        only: Rows to print; None prints all.
    """
    shown = dataclasses.replace(evaluation, results=tuple(only)) if only is not None else evaluation
    heads, rows = cells(shown, horizons, narrow=True)
    for result, row in zip(shown.results, rows, strict=True):
        if result.projected and shown.find(result.method) is not None:
            row[0] = "  " + row[0][row[0].index("+ projection") :]
    console = plain_console(console)
    width = console.width if console.is_terminal else WIDTH
    kept = _fitting(heads, rows, width)
    table = rich_table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows], title=title, wraps=True)
    left_out = ", ".join(" ".join(head.split()) for i, head in enumerate(heads) if i not in kept)
    notes = [f"Columns left out to fit {width} characters: {left_out}."] if left_out else []
    print_with_notes(table, [*notes, *explanation(evaluation, narrow=True)], console, width)


def _fitting(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the columns that fit a width: the first and the last error, the gain and the cost stay longest."""
    errors = [head for head in heads if head.startswith("MSE")]
    order = ("drift", "improved", "gain % over", "95 %", *errors[1:-1], "reward", *errors[:-1], "model")
    kept = list(range(len(heads)))
    for start in order:
        if least_width(rich_table([heads[i] for i in kept], [[row[i] for i in kept] for row in rows], wraps=True)) <= width:
            break
        kept = [i for i in kept if not heads[i].startswith(start)]
    return kept


def cells(evaluation: Evaluation, horizons: Sequence[int], *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Return the column heads and the text of every cell.

    Args:
        evaluation: What to show.
        horizons: Steps of the error columns, each with its 95 % interval.
        narrow: Show the interval of the last step alone, in a column of its own, and no peak memory.
    """
    heads = ["method", *(f"MSE at\nstep {h}" for h in horizons), *([f"95 % of\nstep {horizons[-1]}"] if narrow and horizons else [])]
    heads += ["gain %\nmean / median", "improved\n%"]
    heads += ["gain % over\ndet. + proj.", *(["drift"] if evaluation.quantities else []), "\ns", "model\nevals", "reward\nevals"]
    heads += [] if narrow else ["peak\nMB"]
    return heads, [_cells(evaluation, result, horizons, narrow) for result in evaluation.results]


def explanation(evaluation: Evaluation, *, narrow: bool = False) -> list[str]:
    """Return the meaning of the columns of ``cells``, followed by the notes of the evaluation."""
    unit = "each channel in units of its training standard deviation" if evaluation.scale is not None else "physical units"
    lines = [
        f"MSE: mean over {evaluation.problems} problems of the squared error at a step, {unit}; in brackets, or as 95 %, its interval "
        f"over problems by the percentile bootstrap ({RESAMPLES:,} samples).",
        f"gain: SampleGain of each problem over the deterministic rollout, on the error averaged over steps 1 to {evaluation.scored}; "
        '"none" where it is not above 0. improved: share of the problems with a smaller error than the deterministic rollout.',
        *([_drift(evaluation)] if evaluation.quantities else []),
        "s, model evals, reward evals: seconds and evaluations for all problems together; one evaluation is one state through the "
        "model, or one candidate scored or moved by the reward."
        + (" n + m: n model evaluations and m steps of a classical solver, for its candidates." if _solves(evaluation) else ""),
        *([] if narrow else [PEAK]),
    ]
    if evaluation.find("oracle") is not None:
        lines.append("oracle: chooses by the true error, which no user has: the ceiling of choosing step by step among these candidates.")
    if evaluation.find("span_oracle") is not None:
        lines.append("span oracle: least squares on the truth in the span of the candidates: the ceiling of combining them.")
    return [*lines, *evaluation.notes]


def in_words(names: Sequence[str]) -> str:
    """Join names: "mass, momentum and energy"."""
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def _drift(evaluation: Evaluation) -> str:
    several = len(evaluation.quantities) > 1
    which = "largest of the relative drifts" if several else "relative drift"
    return f"drift: the {which} of {in_words(evaluation.quantities)} after {evaluation.steps} steps, mean over problems."


def rich_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, text_columns: int = 1, wraps: bool = False
) -> Table:
    """Return a table for a terminal, with the first ``text_columns`` columns aligned left and the others right.

    ``wraps`` lets the first column wrap between words, down to ``NAMES`` characters, where the table is wider than the terminal.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        names = wraps and i == 0
        longest = max(len(line) for text in (head, *(row[i] for row in rows)) for line in text.split("\n"))
        least = min(NAMES, longest) if names else longest  # rich's own minimum is a word, to which it would cut
        table.add_column(head, justify="left" if i < text_columns else "right", no_wrap=not names, vertical="bottom", min_width=least)
    for row in rows:
        table.add_row(*row)
    return table


def print_with_notes(table: Table, notes: Sequence[str], console: Console | None = None, width: int | None = None) -> None:
    """Print a table with notes below it: at ``width``, if it can be so narrow, or else without wrapping lines on a narrow console."""
    console = plain_console(console)
    print_whole(console, table, width)
    for note in notes:
        console.print(note, style="dim", soft_wrap=not console.is_terminal)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], *, text_columns: int = 1) -> str:
    """Return a table in Markdown, followed by the notes as a list."""
    lines = [[head.replace("\n", " ") for head in heads], ["---"] * text_columns + ["---:"] * (len(heads) - text_columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "".join(f"* {note}\n" for note in notes)


def _cells(evaluation: Evaluation, result: MethodResult, horizons: Sequence[int], narrow: bool) -> list[str]:
    lost = int(result.blown_up.sum())
    name = result.name + (f" ({lost}/{evaluation.problems} blew up)" if lost else "") + (" (recorded)" if result.recorded else "")
    if narrow:
        errors = [*(_error(result, h) for h in horizons), *(_interval(result, h) or MISSING for h in horizons[-1:])]
    else:
        errors = [" ".join(filter(None, (_error(result, h), _interval(result, h)))) for h in horizons]
    is_baseline = result is evaluation.baseline
    gain, over = evaluation.gain(result), evaluation.gain_over_projected(result)
    return [
        name,
        *errors,
        "baseline" if is_baseline else _gain(gain),
        MISSING if is_baseline else f"{gain.improved:.0f}",
        MISSING if over is None else "baseline" if result is evaluation.projected_baseline else _gain(over),
        *([_short(result.largest_final_drift(evaluation.quantities))] if evaluation.quantities else []),
        f"{result.seconds:.1f}",
        str(result.evaluations) + (f" + {result.solver_steps}" if result.solver_steps else ""),
        str(result.reward_evaluations),
        *([] if narrow else [MISSING if result.peak_bytes is None else f"{result.peak_bytes / MEGABYTE:.0f}"]),
    ]


def _solves(evaluation: Evaluation) -> bool:
    """Whether a row has steps of a classical solver among its candidates."""
    return any(result.solver_steps for result in evaluation.results)


def _error(result: MethodResult, step: int) -> str:
    if step > result.steps:
        return MISSING
    value = result.mse_at(step)
    return _short(value) if math.isfinite(value) else "blew up"


def _interval(result: MethodResult, step: int) -> str:
    low, high = result.interval_at(step)
    return f"[{_short(low)}, {_short(high)}]" if math.isfinite(low) else ""


def _gain(gain: Gain) -> str:
    return f"{percent(gain.mean)} / {percent(gain.median)}"


def percent(value: float) -> str:
    """Format a gain in percent: "none" where it is not above 0.

    Source: docs/design/decisions.md ("Honest baselines").
    """
    if math.isnan(value):
        return MISSING
    return f"{value:.1f}" if value >= 0.05 else "<0.05" if value > 0 else "none"


def _short(value: float) -> str:
    """Format to three digits: 0.00812, 1.19, 3.2e-07."""
    if not math.isfinite(value):
        return MISSING
    return f"{value:.1e}" if 0 < abs(value) < 1e-4 else f"{value:.3g}"
