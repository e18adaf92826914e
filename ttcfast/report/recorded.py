"""Rows of a table measured by another run on the same problems, stored as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.evaluation.evaluate import Problems
from ttcfast.evaluation.results import MethodResult
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import parse_json, require_regular, write_json

ROWS = "rows.json"  # the rows that a run measured itself


def read_rows(folder: str | os.PathLike[str], problems: Problems, branching_factor: int) -> tuple[list[MethodResult], str]:
    """Read the rows of another run on the same problems, and a sentence about them.

    Raises:
        DataError: As ``read_recorded``, or the rows have another branching factor.
    """
    rows, _ = read_recorded(Path(folder) / ROWS, problems)
    if other := [r for r in rows if r.beam_width == 1 and "symmetry" not in r.method and r.branching_factor not in (1, branching_factor)]:
        raise DataError(
            f"run {folder} has {other[0].name} with B = {other[0].branching_factor} and this table has B = {branching_factor}; run both "
            "with the same, or show them beside each other with ttcfast report"
        )
    names = ", ".join(r.name for r in rows)
    return [dataclasses.replace(r, recorded=None) for r in rows], f"Measured by {folder} on the same problems: {names}."


def fingerprints(problems: Problems) -> list[str]:
    """Hash the initial condition of each problem, with the frames before it, so that only errors on the same problems are compared."""
    start = problems.window(0, problems.history).detach().cpu().float()
    return [hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16] for x in start]


def write_recorded(path: str | os.PathLike[str], results: list[MethodResult], problems: Problems, about: dict[str, Any]) -> None:
    """Record the errors, drifts and cost of ``results`` for later tables.

    Args:
        path: The JSON file.
        results: Results on ``problems``.
        problems: The problems, whose initial conditions are fingerprinted.
        about: Origin of the results: at least ``"note"``, a sentence for readers of the table.

    Raises:
        OutputError: The file cannot be written.
    """
    names = [field.name for field in dataclasses.fields(MethodResult) if field.name not in ("trajectory", "recorded")]
    rows = [{name: getattr(result, name) for name in names} for result in results]
    scale = None if problems.scale is None else problems.scale.flatten().tolist()
    write_json(path, {"about": about, "problems": fingerprints(problems), "scale": scale, "results": rows})


def read_recorded(path: str | os.PathLike[str], problems: Problems) -> tuple[list[MethodResult], str]:
    """Read the recorded results of ``problems``, cut to their steps, and the sentence about them.

    Time and evaluations are pro rata if more problems were recorded.

    Raises:
        DataError: The file is missing or damaged, or was recorded on other problems, in other units or over fewer steps.
    """
    try:
        held = parse_json(require_regular(path, "recorded run", "make it again or leave it out").read_text(encoding="utf-8"))
        note, found, scale = str(held["about"]["note"]), list(held["problems"]), held["scale"]
        results = [_result(row, note) for row in held["results"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"recorded run {path} is missing or damaged ({error}); make it again or leave it out") from error
    wanted = fingerprints(problems)
    if missing := [i for i, name in enumerate(wanted) if name not in found]:
        raise DataError(f"recorded run {path} is of other problems (it lacks {missing} of these {len(wanted)}); record it on these")
    ours = None if problems.scale is None else problems.scale.flatten()
    if (scale is None) != (ours is None) or (ours is not None and not torch.allclose(torch.tensor(scale), ours.float().cpu(), rtol=1e-5)):
        raise DataError(f"recorded run {path} measured errors in other units (scale {scale}); record it again with this checkpoint")
    if any(r.steps < problems.scored for r in results):
        raise DataError(f"recorded run {path} has fewer steps than the {problems.scored} of this table; record it again with as many")
    rows = [found.index(name) for name in wanted]
    return [_cut(r, rows, problems) for r in results], note


def _result(row: dict[str, Any], note: str) -> MethodResult:
    drift = {quantity: _tensor(lines) for quantity, lines in row["drift"].items()}
    variances = None if row.get("variances") is None else _tensor(row["variances"])
    return MethodResult(**{**row, "mse": _tensor(row["mse"]), "drift": drift, "variances": variances, "recorded": note})


def _tensor(lines: list[list[float | None]]) -> Tensor:
    """``[N, T+1]`` float64; JSON's null is NaN."""
    return torch.tensor([[math.nan if v is None else v for v in line] for line in lines], dtype=torch.float64)


def _cut(result: MethodResult, rows: list[int], problems: Problems) -> MethodResult:
    drift = {quantity: value[rows, : problems.steps + 1] for quantity, value in result.drift.items()}
    whole = result.variances is not None and result.steps == problems.scored  # else they are those of another step
    variances = result.variances[rows] if whole and result.variances is not None else None
    mse = result.mse[rows, : problems.scored + 1]
    return dataclasses.replace(result.first(len(rows)), mse=mse, drift=drift, variances=variances)
