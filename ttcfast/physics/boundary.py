"""Ghost cells for the finite-volume solver: periodic, outflow (zero gradient) and reflecting (slip wall) sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttcfast.checks import one_of

KINDS = ("periodic", "outflow", "reflecting")


def per_axis(boundary: str | Sequence[str], ndim: int) -> tuple[str, ...]:
    """One boundary kind per space axis, checked."""
    kinds = (boundary,) * ndim if isinstance(boundary, str) else tuple(boundary)
    if len(kinds) != ndim:
        raise ValueError(f"boundary names {len(kinds)} axes {kinds}; the state has {ndim}: give one kind or {ndim} of them")
    for kind in kinds:
        one_of("boundary", kind, KINDS)
    return kinds


def pad(field: Tensor, axis: int, kind: str, *, odd: bool, width: int = 2) -> Tensor:
    """Extend one field by ``width`` ghost cells on both ends of ``axis``.

    ``odd`` marks the velocity component normal to the wall, which changes sign in a reflecting wall's ghost cells.
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
