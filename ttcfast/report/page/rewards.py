"""Sections on the calibration of the rewards and on the compute frontier."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import torch

from ttcfast.evaluation.results import LABELS
from ttcfast.metrics.calibration import calibration
from ttcfast.report.figures.errors import search_label
from ttcfast.report.outputs import CALIBRATION, FRONTIER
from ttcfast.runtime.files import parse_json, require_regular

from .html import Markup, joined, number, table, tag

BUCKETS = 8
_COLUMNS = {  # of the file, and their heads on the page
    "beam_width": "k",
    "branching_factor": "B",
    "evaluations_per_step": "evaluations per step and problem",
    "rollout_mse": "rollout MSE",
    "ratio_to_deterministic": "× deterministic",
    "seconds": "s",
    "evaluations": "model evals",
}
Group = list[tuple[float, float]]  # (score, error) of the usable candidates of one state


def calibration_section(folder: Path) -> Markup | None:
    """Tabulate for every reward the true error by bucket of score, and the value of choosing within each state.

    None if the run kept no scores.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return None
    held = parse_json(require_regular(path, "record", "make the run again").read_text(encoding="utf-8"))
    parts = [_of_reward(str(name), held["errors"], scores) for name, scores in held["scores"].items()]
    if not parts:
        return None
    candidates = len(held["errors"][0]) if held["errors"] else 0
    note = "Every candidate's score beside its true error after one step,"
    note += f" on {len(held['errors'])} true states with {candidates} candidates each."
    return joined(tag("h3", "Calibration of the rewards"), tag("p", note, class_="note"), parts)


def _of_reward(name: str, errors: Sequence[Sequence[Any]], scores: Sequence[Sequence[Any]]) -> Markup:
    label = LABELS.get(name, name)
    groups: list[Group] = [
        [(float(s), float(e)) for s, e in zip(line, true, strict=True) if s is not None and e is not None]
        for line, true in zip(scores, errors, strict=True)
    ]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return tag("p", f"{label}: no state has two candidates that can be compared.", class_="note")
    pairs = sorted(pair for group in groups for pair in group)
    scored, true = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    found = calibration(scored, true, bins=BUCKETS)
    ends = list(accumulate(found.count.tolist(), initial=0))
    buckets = [pairs[a:b] for a, b in pairwise(ends)]
    low, high = ([_quartiles([e for _, e in bucket])[i] for bucket in buckets] for i in (0, 2))
    means = found.error.tolist()
    rows = [
        [i + 1, number(b[0][0]), number(b[-1][0]), number(len(b)), number(means[i]), number(low[i]), number(high[i])]
        for i, b in enumerate(buckets)
    ]
    heads = ("bucket", "lowest score", "highest score", "candidates", "mean MSE", "25 %", "75 %")
    return joined(
        tag("p", _verdict(label, groups, found.rank_correlation), class_="note"),
        table(f"{label}: scores in buckets of equal size and the true errors in them (band: 25 to 75 %)", heads, rows),
    )


def _verdict(label: str, groups: Sequence[Group], pooled: float) -> str:
    chosen = [max(group)[1] for group in groups]
    best, middle = [min(e for _, e in g) for g in groups], [fmean(e for _, e in g) for g in groups]
    possible = fmean(middle) - fmean(best)
    share = f"{100 * (fmean(middle) - fmean(chosen)) / possible:.0f} %" if possible > 0 else "none to be had"
    tau = fmean(_kendall(group) for group in groups)
    return (
        f"{label}: over all candidates the rank correlation of score and error is {_signed(pooled)} (−1: perfect, 0: none). "
        f"Within a state, Kendall's tau of score and −error is {_signed(tau)} on average (1: perfect, 0: none). "
        f"Choosing by score takes {share} of the gain that the best candidate has over the average one."
    )


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _kendall(group: Group) -> float:
    """Return Kendall's tau-a of score and minus error; ties count as 0."""
    total = 0
    for i, (s, e) in enumerate(group):
        total += sum(int(math.copysign(1, (s - t) * (f - e))) for t, f in group[:i] if (s - t) * (f - e) != 0)
    return total / (len(group) * (len(group) - 1) / 2)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    a, b, c = quantiles(values, n=4, method="inclusive")
    return a, b, c


def frontier_section(folder: Path) -> Markup | None:
    """Tabulate the compute frontier, with the best point of each reward marked; None if the run traced none."""
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
