"""Data augmentation by the symmetries of a gas in a periodic square, and by those that a layout declares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ttcfast.spec import EulerSpec, StateSpec
from ttcfast.states.symmetry import group_of


def random_symmetry(windows: Tensor, spec: StateSpec, rng: np.random.Generator) -> Tensor:
    """Shift, mirror and transpose each window at random, and its momentum accordingly.

    Args:
        windows: ``[M, L, C, X, Y]`` in the layout of ``spec``; shifts need both axes periodic, transposing needs X = Y.
        spec: Layout with two space dimensions and two momentum (or velocity) components.
        rng: Random generator of the choices.

    Returns:
        ``[M, L, C, X, Y]``: the transformed windows, which solve the same equations.

    Raises:
        ValueError: ``spec`` has another number of dimensions or components.
    """
    if not isinstance(spec, EulerSpec) or spec.ndim != 2 or len(spec.momentum) != 2:
        raise ValueError(f"spec is {spec}; the symmetries are those of a gas with two momentum components in two dimensions")
    return torch.stack([_transformed(window, spec, rng) for window in windows])


def random_declared(windows: Tensor, spec: StateSpec, rng: np.random.Generator) -> Tensor:
    """Show each window under a random one of the symmetries and translations that its layout declares; without any, as it is.

    Args:
        windows: ``[M, L, C, *S]`` in the layout of ``spec``.
        spec: Layout with ``symmetries`` and ``translations``.
        rng: Random generator of the choices.
    """
    group = group_of(spec, windows.shape[3:])
    turned = torch.stack([group[int(rng.integers(len(group)))].apply(window, spec) for window in windows])
    return random_shift(turned, spec.translations, rng)


def random_shift(windows: Tensor, axes: Sequence[int], rng: np.random.Generator) -> Tensor:
    """Shift each window at random along periodic axes.

    Args:
        windows: ``[M, L, C, *S]``.
        axes: Space axes, counted from 0.
        rng: Random generator of the shifts.
    """
    space = windows.shape[3:]
    shifts = [[int(rng.integers(space[axis])) for axis in axes] for _ in windows]
    return torch.stack([window.roll(shift, [2 + axis for axis in axes]) for window, shift in zip(windows, shifts)]) if axes else windows


def _transformed(window: Tensor, spec: EulerSpec, rng: np.random.Generator) -> Tensor:
    shape = window.shape[-2:]
    swap = bool(rng.integers(2)) and shape[0] == shape[1] and len(set(spec.periodic_axes)) == 1
    shifts = [int(rng.integers(n)) if wraps else 0 for n, wraps in zip(shape, spec.periodic_axes, strict=True)]
    mirrored = [axis for axis in range(2) if rng.integers(2)]
    out = window.roll(shifts, (-2, -1))
    if mirrored:
        out = out.flip([axis - 2 for axis in mirrored])
    for axis in mirrored:
        out[:, spec.momentum[axis]].neg_()
    if not swap:
        return out
    order = list(range(window.shape[1]))
    a, b = spec.momentum
    order[a], order[b] = b, a
    return out[:, order].transpose(-1, -2)
