"""The section of policies trained inside world models: table, verdict and figures of the runs that are finished."""

from __future__ import annotations

from collections.abc import Sequence

from ttcfast.pwm.policy_result import PolicyResult
from ttcfast.report.figures.policies import policy_figures
from ttcfast.report.policies import cells, details, explanation, in_order
from ttcfast.report.verdict import sentences

from .html import Markup, joined, table, tag
from .pictures import drawn


def policies_section(results: Sequence[PolicyResult]) -> Markup:
    """Return the verdict, both tables with the meaning of its columns, and the figures of ``results``."""
    told = sentences(results) if len({run.arm for run in results}) > 1 else []
    return joined(
        joined(tag("h3", "Verdict"), tag("ul", [tag("li", sentence) for sentence in told])) if told else None,
        tag("h3", f"Policies of {len(results)} finished run{'s' * (len(results) != 1)}"),
        _table("Means over random seeds", *cells(results)),
        _table("What explains them, and what they cost", *details(results)),
        tag("ul", [tag("li", line) for line in explanation(results)], class_="notes"),
        tag("h3", "Figures of the policies"),
        [drawn(draw()) for _, draw in policy_figures(results)],
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    return table(caption, [head.replace("\n", " ") for head in heads], rows, text_columns=2)


def gathered(parts: Sequence[Sequence[PolicyResult]]) -> list[PolicyResult]:
    """Return the results of several folders as those of one protocol; none if two are of one task, arm and random seed."""
    found = in_order(run for part in parts for run in part)
    return found if len({(run.task, run.arm, run.seed) for run in found}) == len(found) else []
