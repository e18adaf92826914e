"""Measures how far the conserved totals of a trajectory drift from their initial values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.physics.equation_of_state import gamma_field, primitive_parts, to_conserved
from ttcfast.spec import EulerSpec, Momentum, StateSpec
from ttcfast.transfer import indices, on_device

from .layout import batched


def conservation_drift(trajectory: Tensor, spec: StateSpec, *, momentum: Momentum = "components") -> dict[str, Tensor]:
    """Returns the relative change of the conserved totals since the first frame: of a gas those of mass, momentum and energy.

    With ``d_q(t) = sum_cells volume * (q(t) - q(0))``, summed over per-cell differences in float64, the drift of mass is
    ``|d_rho| / sum volume |rho(0)|`` and that of energy ``|d_E| / sum volume |E(0)|``. That of momentum combines the components of
    ``d_(rho u)`` and divides by ``sum volume |rho| (|u| + c)`` at the first frame, which is positive even if the total momentum is 0.
    A quantity of other fields is divided by the integral of its magnitude at the first frame, or where that is 0, as of momentum at rest,
    by the largest one of a later frame.

    Args:
        trajectory: ``[N, T+1, C, *S]`` or ``[C, T+1, *S]`` in physical units, in the variables of ``spec``.
        spec: Channels, gamma (a number or ``[N]``) and cell volume. On open domains, fluxes through the boundary count as drift.
        momentum: ``"components"`` adds the components' absolute values, ``"norm"`` takes their Euclidean norm, ``"sum"`` adds them
            before the absolute value, so that errors can cancel.

    Returns:
        By name, mass, momentum and energy or the quantities that the layout declares; each float64 ``[N, T+1]`` (``[T+1]`` for one
        trajectory), non-negative, 0 at the first frame, and NaN at frames that hold NaN.

    Raises:
        ValueError: The axes match neither layout, or the trajectory lacks channels that ``spec`` names.

    Source: docs/design/decisions.md ("Sums of differences"), ("Absolute and relative penalties"), ("Momentum penalty").
    """
    one_of("momentum", momentum, ("sum", "components", "norm"))
    frames, single = batched("trajectory", trajectory, spec.ndim)
    spec.check_state("trajectory", frames[:, 0], channel_axis=1)
    gas = isinstance(spec, EulerSpec)
    first = conserved_fields(frames[:, 0], spec) if isinstance(spec, EulerSpec) else frames[:, 0].double()
    rows = first.shape[1]
    groups = {"mass": (0,), "momentum": tuple(range(1, rows - 1)), "energy": (rows - 1,)} if gas else spec.conserved_groups
    if not groups:
        return {}
    volume = on_device(spec.cell_volume, first.device, first.dtype)
    if isinstance(spec, EulerSpec):
        sizes = _sizes(first, spec, volume)
    else:
        sizes = _magnitudes(first, groups, volume)
        if bool((sizes == 0).any()):
            largest = torch.stack([_magnitudes(frame, groups, volume) for frame in frames.unbind(1)]).nan_to_num(posinf=0).amax(0)
            sizes = torch.where(sizes == 0, largest.clamp_min(1e-300), sizes)
    drift = []
    for t in range(frames.shape[1]):
        fields = conserved_fields(frames[:, t], spec) if isinstance(spec, EulerSpec) else frames[:, t].double()
        change = _integral(fields - first, volume)  # [N, rows]
        drift.append(torch.stack([_combine(change[:, list(group)], momentum) for group in groups.values()], 1) / sizes)
    out = torch.stack(drift, 1)  # [N, T+1, quantities]
    out = out[0] if single else out
    return dict(zip(groups, out.unbind(-1)))


def conserved_fields(x: Tensor, spec: EulerSpec) -> Tensor:
    """Converts states of a gas ``[N, C, *S]`` to float64 density, momentum and energy, ``[N, d+2, *S]``."""
    last = spec.energy if spec.variables == "conserved" else spec.pressure
    assert last is not None  # StateSpec requires the one that its variables need
    fields = x[:, indices((spec.density, *spec.momentum, last), x.device)].double()
    return fields if spec.variables == "conserved" else to_conserved(fields, spec.gamma)


def _sizes(first: Tensor, spec: EulerSpec, volume: Tensor) -> Tensor:
    """Denominators ``[N, 3]`` of the drifts: volume integrals of |rho|, |rho| (|u| + c) and |E|."""
    gamma = gamma_field(spec.gamma, first)
    rho, velocity, pressure = primitive_parts(first, gamma)
    speed = torch.stack(velocity, 1).square().sum(1).sqrt()
    sound = (gamma * pressure.clamp_min(0) / rho.abs().clamp_min(1e-300)).sqrt()
    parts = torch.stack([rho.abs(), rho.abs() * (speed + sound), first[:, -1].abs()], 1)
    return _integral(parts, volume).clamp_min(1e-300)


def _magnitudes(x: Tensor, groups: Mapping[str, tuple[int, ...]], volume: Tensor) -> Tensor:
    """Integrals ``[N, quantities]`` of the magnitudes of quantities of states ``[N, C, *S]``."""
    return _integral(torch.stack([x[:, list(group)].double().square().sum(1).sqrt() for group in groups.values()], 1), volume)


def _integral(fields: Tensor, volume: Tensor) -> Tensor:
    return (fields * volume).flatten(2).sum(2)


def _combine(components: Tensor, momentum: Momentum) -> Tensor:
    if momentum == "sum":
        return components.sum(1).abs()
    return components.abs().sum(1) if momentum == "components" else components.norm(dim=1)
