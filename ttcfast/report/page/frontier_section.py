"""The section on the compute frontier: what every search reached with how many model evaluations."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from ttcfast.evaluation.results import LABELS
from ttcfast.report.figures.error_evaluations import search_label
from ttcfast.report.outputs import FRONTIER
from ttcfast.runtime.files import require_regular

from .html import Markup, joined, number, table, tag

_COLUMNS = {  # of the file, and their heads on the page
    "beam_width": "k",
    "branching_factor": "B",
    "evaluations_per_step": "evaluations per step and problem",
    "rollout_mse": "rollout MSE",
    "ratio_to_deterministic": "× deterministic",
    "seconds": "s",
    "evaluations": "model evals",
}


def frontier_section(folder: Path) -> Markup | None:
    """The points of the frontier as a table, the best of each reward marked. None where the run traced none."""
    path = folder / FRONTIER
    if not path.exists():
        return None
    with open(require_regular(path, "table", "make the run again"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return None
    best: dict[str, float] = {}
    for row in rows:
        if math.isfinite(error := float(row["rollout_mse"])):
            best[row["reward"]] = min(error, best.get(row["reward"], error))
    body = []
    for row in rows:
        marked = float(row["rollout_mse"]) == best.get(row["reward"])
        cells = [number(float(row[name]), best=marked and name == "ratio_to_deterministic") for name in _COLUMNS]
        body.append([LABELS.get(row["reward"], row["reward"]), search_label(row["search"]), *cells])
    note = "Every search with every reward at about the same numbers of model evaluations, on the first problems of the run. "
    note += "× deterministic: rollout MSE over that of the deterministic rollout, which takes one evaluation per step. Marked: the best."
    heads = ("reward", "search", *_COLUMNS.values())
    return joined(
        tag("h3", "Error against model evaluations"),
        tag("p", note, class_="note"),
        table("Compute frontier: searches at the same cost", heads, body, text_columns=2),
    )
