"""Fields of the problems that a run shows, stored compactly so that a page can animate them without the model."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ttcfast.evaluation.evaluate import Evaluation
from ttcfast.evaluation.results import MethodResult
from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import atomic_path, parse_json, require_regular

FILE = "fields.npz"
MOST_FRAMES, MOST_CELLS = 41, 128
"""Limits on frames and on cells along an axis, so that a page can hold several problems."""


@dataclass(frozen=True, eq=False)
class ShownFields:
    """One quantity of the shown problems for the truth, the deterministic rollout and one method.

    Args:
        truth, deterministic, method: float32 ``[P, F, X, Y]``, or ``[P, F, X]`` in one dimension; not finite where a rollout blew up.
        steps: ``[F]``, rollout steps of the frames.
        times: ``[F]``, times of the frames, or None.
        problems: Indices of the problems.
        name: Label of the method.
        quantity: Name of the quantity.
    """

    truth: np.ndarray
    deterministic: np.ndarray
    method: np.ndarray
    steps: tuple[int, ...]
    times: tuple[float, ...] | None
    problems: tuple[int, ...]
    name: str
    quantity: str


def write_fields(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    result: MethodResult,
    *,
    times: Tensor | None = None,
    channel: int = 0,
    quantity: str = "density",
) -> None:
    """Write one channel of truth, deterministic rollout and ``result`` for the shown problems, thinned for a page.

    Args:
        path: The ``.npz`` file.
        evaluation, result, times, channel, quantity: As in ``figures.field_panels``; in three dimensions the middle slice in z is kept.

    Raises:
        ValueError: ``result`` has no trajectory.
        OutputError: The file cannot be written.
    """
    if result.trajectory is None or evaluation.baseline.trajectory is None:
        raise ValueError(f"{result.name} has no trajectory; evaluate with Problems(shown=...) naming the problem to keep")
    last = min(evaluation.scored, result.trajectory.shape[1] - 1)
    steps = sorted({round(s) for s in np.linspace(0, last, min(last + 1, MOST_FRAMES))})
    instants = [float(times[s]) for s in steps] if times is not None and steps[-1] < len(times) else []
    sources = {"truth": evaluation.truth, "deterministic": evaluation.baseline.trajectory, "method": result.trajectory}
    about = {"name": result.name, "quantity": quantity}
    with atomic_path(path) as place:
        held: dict[str, Any] = {name: _small(states[:, steps, channel]) for name, states in sources.items()}
        held |= {
            "about": np.array(json.dumps(about)),
            "steps": np.array(steps),
            "times": np.array(instants),
            "problems": np.array(evaluation.shown),
        }
        np.savez_compressed(place, **held)


def read_fields(path: str | os.PathLike[str]) -> ShownFields:
    """Read the file of ``write_fields``.

    Raises:
        DataError: The file is damaged or holds something else.
    """
    try:
        with np.load(require_regular(path, "fields of a run", "make the run again"), allow_pickle=False) as held:
            about = parse_json(str(held["about"]))
            truth, deterministic, method = (held[name].astype(np.float32) for name in ("truth", "deterministic", "method"))
            steps, problems, times = held["steps"].tolist(), held["problems"].tolist(), held["times"].tolist()
        names = str(about["name"]), str(about["quantity"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{Path(path)} is damaged or of another version ({error}); make the run again, or delete this file") from error
    expected = (len(problems), len(steps))
    if truth.ndim not in (3, 4) or truth.shape[:2] != expected or not truth.shape == deterministic.shape == method.shape or not truth.size:
        raise DataError(f"{Path(path)} holds {truth.shape} for {expected} problems and frames; make the run again, or delete this file")
    return ShownFields(truth, deterministic, method, tuple(steps), tuple(times) or None, tuple(problems), *names)


def _small(fields: Tensor) -> np.ndarray:
    """Coarsen ``[P, F, *S]`` to at most ``MOST_CELLS`` per axis by block means, which leave shocks in place."""
    values = (fields[..., fields.shape[-1] // 2] if fields.ndim == 5 else fields).detach().float().cpu().numpy()
    for axis in range(2, values.ndim):
        block = -(-values.shape[axis] // MOST_CELLS)
        whole = values.shape[axis] // block
        kept = np.take(values, range(whole * block), axis)
        values = kept.reshape(*kept.shape[:axis], whole, block, *kept.shape[axis + 1 :]).mean(axis + 1)
    return values
