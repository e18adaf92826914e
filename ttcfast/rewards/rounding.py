"""Bounds the spread of scores that rounding of the states alone can cause."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttcfast.ops.arm import Weights, arm_weights
from ttcfast.ops.arm_fields import quantities_of
from ttcfast.spec import EulerSpec, FieldSpec, Scale, StateSpec
from ttcfast.transfer import constant, indices


def arm_spread_floor(state: Tensor, spec: StateSpec, weights: Weights, scale: Scale) -> Tensor:
    """Returns an upper estimate of the spread of analytical scores that rounding alone can cause, float64 ``[N]``.

    A cell of a candidate is a number x rounded to half a unit in the last place, by at most eps |x| / 2. Its total sum(volume x) is
    therefore known to eps / 2 sum(volume |x|), and so are the residual and its absolute value: two candidates with one true total may
    differ by eps sum(volume |x|). Penalties add up with their weights. For ``"relative"`` residuals that sum is the unit of mass and
    energy, which leaves eps; |rho u_k| summed over d components is at most sqrt(d) rho |u|, which leaves sqrt(d) eps. In primitive
    variables rho u contains two rounded factors and rho u^2 three. The boundary penalty, a mean of |x - value|, is known to eps mean |x|.
    Positivity has no floor: it is exactly 0 wherever density and pressure are positive. |x| is taken from the current state.

    The estimate assumes that all errors have the same sign. Random signs would give sqrt(cells) times less, but a correction that is
    rounded once and added to every cell, such as a removed mean, errs everywhere alike. Along the shipped directions the largest spread of
    100 candidates was 0.1 of this floor; with dropout, or input or latent noise, the smallest of 16 was 150 times the floor (64x64 cells).

    Args:
        state: Current states, ``[N, C, *S]``.
        spec: Layout of the states, with its tensors on their device.
        weights: Weight of each penalty.
        scale: Whether penalties are absolute or relative; see ``ttcfast.ops.arm``.
    """
    eps = torch.finfo(state.dtype).eps
    total = _of_fields(state, spec, weights, scale) if isinstance(spec, FieldSpec) else _of_gas(state, spec, weights, scale)
    if spec.boundary_mask is not None:
        masked = spec.boundary_mask
        size = torch.where(masked, state.double().abs(), 0.0).flatten(1).sum(1)
        total = total + arm_weights(spec, weights)["boundary"] * size / (masked.sum().clamp_min(1) * state.shape[1])
    return eps * total


def _of_fields(state: Tensor, spec: FieldSpec, weights: Weights, scale: Scale) -> Tensor:
    """The spread in units of eps: of quantities as for a gas, and of the divergence by the size of the values that it subtracts."""
    named, total = arm_weights(spec, weights), state.new_zeros(len(state), dtype=torch.float64)
    for name, channels in quantities_of(spec).items():
        sizes = (state[:, indices(channels, state.device)].double().abs() * spec.cell_volume).flatten(1).sum(1)
        total = total + named[name] * (math.sqrt(len(channels)) if scale == "relative" else sizes)
    if not spec.solenoidal:
        return total
    distances = constant(spec.distances, state.device, torch.float64).reshape(-1, *[1] * spec.ndim)
    rough, slopes = torch.zeros_like(total), torch.zeros_like(total)
    for vector in spec.solenoidal:
        fields = state[:, indices(vector, state.device)].double()
        rough = rough + (fields.abs() / distances).flatten(1).sum(1)
        for k, h in enumerate(spec.distances):
            slopes = slopes + (fields[:, k].diff(dim=1 + k) / h).abs().flatten(1).sum(1)
    cells = state[0, 0].numel()  # also the unit of a state without slopes, whose divergence is absolute
    units = torch.where(slopes == 0, cells, slopes) if scale == "relative" else cells
    return total + named["divergence"] * rough / units


def _of_gas(state: Tensor, spec: StateSpec, weights: Weights, scale: Scale) -> Tensor:
    assert isinstance(spec, EulerSpec)
    named, channels = arm_weights(spec, weights), indices((spec.density, *spec.momentum), state.device)
    rounded = (1.0, 2.0, 3.0) if spec.variables == "primitive" else (1.0, 1.0, 1.0)
    parts = [named[name] * factor for name, factor in zip(("mass", "momentum", "energy"), rounded)]
    if scale == "relative":
        return state.new_full((len(state),), parts[0] + math.sqrt(len(spec.momentum)) * parts[1] + parts[2], dtype=torch.float64)
    sizes = state[:, channels].double().abs()
    if spec.variables == "primitive":
        sizes = torch.cat([sizes[:, :1], sizes[:, :1] * sizes[:, 1:]], 1)
    sums = (torch.cat([sizes, _energy(state, spec).unsqueeze(1)], 1) * spec.cell_volume).flatten(2).sum(2)  # [N, d + 2]
    return parts[0] * sums[:, 0] + parts[1] * sums[:, 1:-1].sum(1) + parts[2] * sums[:, -1]


def _energy(state: Tensor, spec: EulerSpec) -> Tensor:
    """Absolute energy of each cell, ``[N, *S]`` float64."""
    if spec.energy is not None:
        return state[:, spec.energy].double().abs()
    assert spec.pressure is not None  # primitive variables have one
    gamma = spec.gamma.double().reshape(-1, *[1] * spec.ndim) if torch.is_tensor(spec.gamma) else spec.gamma
    velocity = state[:, indices(spec.momentum, state.device)].double()
    kinetic = 0.5 * state[:, spec.density].double().abs() * velocity.square().sum(1)
    return state[:, spec.pressure].double().abs() / (gamma - 1.0) + kinetic
