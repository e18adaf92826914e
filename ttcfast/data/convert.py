"""Conversion between state layouts: primitive and conserved variables in any channel order, and fields by their names."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ttcfast.physics.equation_of_state import gamma_field
from ttcfast.spec import EulerSpec, FieldSpec, StateSpec


def to_spec(x: Tensor, source: StateSpec, target: StateSpec) -> Tensor:
    """Convert states to the channels of ``target``: fields by their names, a gas in float64 with one final rounding.

    Velocity and momentum are related by the density, pressure and energy by the ideal-gas law with the gamma of ``source``; the gamma of
    ``target`` is ignored. A quantity that ``source`` stores is copied, not recomputed: a stored energy is used even if it disagrees with
    the pressure. Channels that ``target`` does not name are dropped. Nothing is clamped: zero density gives non-finite velocities.

    Args:
        x: States ``[..., C, *S]`` in physical units. With a gamma per problem, the first axis runs over problems.
        source: Layout of ``x``.
        target: Layout of the result.

    Returns:
        ``[..., C', *S]`` in the dtype of ``x``, differentiable; ``x`` itself if both layouts have the same channels.

    Raises:
        ValueError: The layouts differ in dimensions or velocity components, ``target`` has more extra channels than ``source`` or leaves
            a channel unnamed, or axes or gammas do not match.
    """
    axis = x.ndim - source.ndim - 1
    source.check_state("x", x if axis == 1 else x.reshape(-1, *x.shape[max(axis, 0) :]), channel_axis=1)
    check_convertible(source, target)
    if same_channels(source, target):
        return x
    if isinstance(source, FieldSpec):
        return x.index_select(axis, torch.tensor([source.names.index(name) for name in target.names], device=x.device))
    assert isinstance(source, EulerSpec) and isinstance(target, EulerSpec)  # as other layouts are not convertible
    # EulerSpec demands the pressure of primitive variables and the energy of conserved ones.
    wide: dict[int | None, Tensor] = {c: x.select(axis, c).double() for c in source.channels}
    rho, flow = wide[source.density], [wide[c] for c in source.momentum]
    stored = source.variables == "conserved"
    momentum = flow if stored else [rho * v for v in flow]
    velocity = [m / rho for m in flow] if stored else flow
    gamma = source.gamma
    if torch.is_tensor(gamma):
        gamma = float(gamma) if gamma.numel() == 1 else gamma_field(gamma, rho.unsqueeze(1) if axis else rho[None, None])
    kinetic = 0.5 * sum(m * v for m, v in zip(momentum, velocity, strict=True))
    fields: dict[int, Tensor] = {target.density: rho}
    fields |= dict(zip(target.momentum, momentum if target.variables == "conserved" else velocity, strict=True))
    if target.energy is not None:
        fields[target.energy] = wide[source.energy] if source.energy is not None else wide[source.pressure] / (gamma - 1) + kinetic
    if target.pressure is not None:
        fields[target.pressure] = wide[source.pressure] if source.pressure is not None else (gamma - 1) * (wide[source.energy] - kinetic)
    fields |= {to: wide[taken] for to, taken in zip(target.extra, source.extra, strict=False)}
    return torch.stack([fields[c] for c in range(target.num_channels)], axis).to(x.dtype)


def check_convertible(source: StateSpec, target: StateSpec) -> None:
    """Raise ``ValueError`` unless states in layout ``source`` can be converted to ``target``."""
    if same_channels(source, target):
        return
    if isinstance(source, FieldSpec) and isinstance(target, FieldSpec):
        if source.ndim != target.ndim or (missing := [name for name in target.names if name not in source.names]):
            what = f"{source.ndim} dimensions, not {target.ndim}" if source.ndim != target.ndim else f"no {', '.join(missing)}"
            raise ValueError(f"source has {what}; it has channels {', '.join(source.names)}, from which fields are chosen by name")
        return
    if not isinstance(source, EulerSpec) or not isinstance(target, EulerSpec):
        raise ValueError(
            f"source has channels {', '.join(source.names)} and target {', '.join(target.names)}; a gas and other fields are not converted "
            "into each other"
        )
    if source.ndim != target.ndim or len(source.momentum) != len(target.momentum):
        raise ValueError(
            f"source has {source.ndim} dimensions and {len(source.momentum)} velocity components, target {target.ndim} and "
            f"{len(target.momentum)}; only layouts of the same space can be converted"
        )
    if len(target.extra) > len(source.extra):
        raise ValueError(f"target has {len(target.extra)} extra channels and source {len(source.extra)}; what they hold is not known")
    if unnamed := sorted(set(range(target.num_channels)) - set(target.channels)):
        raise ValueError(f"target gives channels {unnamed} no meaning; name them, or number the channels without gaps")


def same_channels(a: StateSpec, b: StateSpec) -> bool:
    """Return whether both layouts store the same quantities in the same channels of the same space."""
    return a.ndim == b.ndim and a.meaning == b.meaning


def on_grid_of(layout: StateSpec, grid: StateSpec) -> StateSpec:
    """Return the channels of ``layout`` with the gamma, cell volume and domain of ``grid``, including its boundary mask.

    Of fields, what ``grid`` declares of these channels (conserved quantities, bounds, divergence, zero means, symmetries) holds, entry by
    entry; what it leaves open and which channels are given ``layout`` says.

    Raises:
        ValueError: ``grid`` prescribes boundary values, which belong to its own channels, and ``layout`` has others.
    """
    if grid.boundary_value is not None and not same_channels(layout, grid):
        raise ValueError("grid prescribes boundary values in its own channels; convert them and set boundary_value afterwards")
    names = ["cell_volume", "periodic", "boundary_mask", "boundary_value", *(["gamma", "closed"] if isinstance(grid, EulerSpec) else [])]
    changes = {name: getattr(grid, name) for name in names}
    if isinstance(layout, FieldSpec) and isinstance(grid, FieldSpec):
        changes |= {"spacing": grid.spacing, **_declared(layout, grid)}
    found: StateSpec = layout.replace(**changes)
    return found


def _declared(layout: FieldSpec, grid: FieldSpec) -> dict[str, Any]:
    """Return what ``grid`` declares of the channels of ``layout``, or else ``layout`` itself."""
    names = set(layout.names)
    given = layout.given or tuple(name for name in grid.given if name in names)
    conserved = {name: own for name, own in grid.conserved.items() if set(own) <= names - {*given}}
    found: dict[str, Any] = {
        "conserved": conserved or layout.conserved,
        "bounds": {name: ends for name, ends in grid.bounds.items() if name in names} or layout.bounds,
        "divergence_free": tuple(own for own in grid.divergence_free if set(own) <= names) or layout.divergence_free,
        "mean_zero": tuple(name for name in grid.mean_zero if name in names and name not in given) or layout.mean_zero,
    }
    found["symmetries"] = (
        tuple(dataclasses.replace(g, odd=tuple(name for name in g.odd if name in names)) for g in grid.symmetries) or layout.symmetries
    )
    found["translations"] = grid.translations or layout.translations
    kept = {channel for own in found["conserved"].values() for channel in own} | set(found["mean_zero"])
    return {**found, "given": tuple(name for name in given if name not in kept)}
