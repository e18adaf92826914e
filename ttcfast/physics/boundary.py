"""Ghost cells for the finite-volume solver: periodic, outflow (zero gradient) and reflecting (slip wall) sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttcfast.checks import one_of

KINDS = ("periodic", "outflow", "reflecting")


def per_axis(boundary: str | Sequence[str], ndim: int) -> tuple[str, ...]:
    """Return one boundary kind per space axis; ``ValueError`` for an unknown kind or a wrong number of them."""
    kinds = (boundary,) * ndim if isinstance(boundary, str) else tuple(boundary)
    if len(kinds) != ndim:
        raise ValueError(f"boundary names {len(kinds)} axes {kinds}; the state has {ndim}: give one kind or {ndim} of them")
    for kind in kinds:
        one_of("boundary", kind, KINDS)
    return kinds


def pad(field: Tensor, axis: int, kind: str, *, odd: bool, width: int = 2) -> Tensor:
    """Extend one field by ``width`` ghost cells on both ends of ``axis``.

    Args:
        field: Any field; ``axis`` is one of its space axes.
        axis: The axis to extend.
        kind: ``"periodic"``, ``"outflow"`` or ``"reflecting"``.
        odd: Whether the field is the velocity normal to the wall, whose sign flips in the ghost cells of a reflecting wall.
        width: Number of ghost cells per end.
    """
    n = field.shape[axis]
    if kind == "periodic":
        low, high = field.narrow(axis, n - width, width), field.narrow(axis, 0, width)
    elif kind == "outflow":
        shape = [-1] * field.ndim
        shape[axis] = width
        low, high = field.narrow(axis, 0, 1).expand(shape), field.narrow(axis, n - 1, 1).expand(shape)
    else:
        low, high = field.narrow(axis, 0, width).flip(axis), field.narrow(axis, n - width, width).flip(axis)
        if odd:
            low, high = -low, -high
    return torch.cat([low, field, high], dim=axis)
