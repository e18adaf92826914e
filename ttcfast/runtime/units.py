"""The time step, cell and gamma that data, surrogates, rewards and directions are made for; what does not fit is refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Relative; far above what float32 coordinates and instants leave of a step, and far below what a model could tell."""


@dataclass(frozen=True)
class Units:
    """Time step, cell volume and gamma that an object was made for; None where one is unknown or irrelevant.

    Args:
        of: Name of the object in messages (``"the surrogate of runs/train_fm/surrogate.safetensors"``).
        time_step: Time between two frames.
        cell_volume: A number, or a tensor ``[*S]``.
        gamma: Ratio of specific heats, a number or a tensor ``[N]``.
    """

    of: str
    time_step: float | None = None
    cell_volume: float | Tensor | None = None
    gamma: float | Tensor | None = None


def time_step_of(times: Tensor) -> float | None:
    """Return the mean step between frames at ``times [T+1]``; None for a single frame."""
    return float(times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def require_units(given: Units, made_for: Units, remedy: str) -> None:
    """Raise unless what both say of time step, cell volume and gamma agrees to ``TOLERANCE``.

    What one of them does not say (checkpoints did not record their time step before) is not compared; of the time step that is logged.

    Args:
        given: usually the data. made_for: what is used with them. remedy: what the message tells the user to do.

    Raises:
        DataError: they differ; names both, both values, and the remedy.
    """
    for name in ("time_step", "cell_volume", "gamma"):
        mine, theirs = getattr(given, name), getattr(made_for, name)
        if mine is None or theirs is None:
            if name == "time_step":
                logger.info("the time steps of %s and %s are not compared: not both are recorded", given.of, made_for.of)
        elif not _agree(mine, theirs):
            raise DataError(
                f"{given.of} has {name.replace('_', ' ')} {_told(mine)} and {made_for.of} is made for {_told(theirs)}; {remedy}"
            )


def _agree(a: Any, b: Any) -> bool:
    """Cell by cell, or problem by problem; where there are more of one, smallest and largest."""
    a, b = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (a, b))
    if a.shape != b.shape:
        a, b = torch.stack(a.aminmax()), torch.stack(b.aminmax())
    return bool(((a - b).abs() <= TOLERANCE * b.abs()).all())


def _told(value: Any) -> str:
    values = sorted({f"{v:.6g}" for v in torch.as_tensor(value).reshape(-1).tolist()})
    return values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}"
