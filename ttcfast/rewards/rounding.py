"""How far apart scores may lie by the rounding of the states alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttcfast.spec import ARMWeights, Scale, StateSpec


def arm_spread_floor(state: Tensor, spec: StateSpec, weights: ARMWeights, scale: Scale) -> Tensor:
    """The spread of the analytical reward, float64 ``[N]``, up to which rounding explains it: an upper estimate from the states being left.

    A cell of a candidate is a number x rounded to half a unit in the last place, by at most eps |x| / 2. Its total sum(volume x) is known
    to eps / 2 sum(volume |x|) and no better, and so are the residual and its absolute value: two candidates of one true total may differ by
    eps sum(volume |x|). Penalties add up with their weights. With ``relative`` residuals that sum is the unit of mass and energy, which
    leaves eps; abs(rho u_k) added over d components is at most sqrt(d) rho |u|, which leaves sqrt(d) eps. Of primitive states rho u is
    rounded in two factors and rho u^2 in three. The boundary penalty, a mean of abs(x - value), is known to eps mean |x|. Positivity has
    no floor: it is 0, not small, wherever density and pressure are positive. |x| is taken of the state that a candidate follows.

    Signs are taken as they fall worst. Random ones would give sqrt(cells) times less, enough for the last rounding alone; but what is
    rounded once and added to every cell, like the mean that is taken out of a move so that it conserves, errs everywhere alike. Along the
    shipped directions the largest spread of 100 candidates was 0.1 of this floor; with dropout, or noise on the input or the latent
    state, the smallest of 16 was 150 times it (64x64 cells).

    Args:
        state: the states being left, ``[N, C, *S]``.
        spec, weights, scale: of the reward, the spec's tensors on the state's device; see ``ttcfast.ops.arm``.
    """
    eps, channels = torch.finfo(state.dtype).eps, [spec.density, *spec.momentum]
    rounded = (1.0, 2.0, 3.0) if spec.variables == "primitive" else (1.0, 1.0, 1.0)
    parts = [w * factor for w, factor in zip((weights.w_mass, weights.w_momentum, weights.w_energy), rounded)]
    if scale == "relative":
        total = state.new_full((len(state),), parts[0] + math.sqrt(len(spec.momentum)) * parts[1] + parts[2], dtype=torch.float64)
    else:
        sizes = state[:, channels].double().abs()
        if spec.variables == "primitive":
            sizes = torch.cat([sizes[:, :1], sizes[:, :1] * sizes[:, 1:]], 1)
        sums = (torch.cat([sizes, _energy(state, spec).unsqueeze(1)], 1) * spec.cell_volume).flatten(2).sum(2)  # [N, d + 2]
        total = parts[0] * sums[:, 0] + parts[1] * sums[:, 1:-1].sum(1) + parts[2] * sums[:, -1]
    if spec.boundary_mask is not None:
        masked = spec.boundary_mask
        size = torch.where(masked, state.double().abs(), 0.0).flatten(1).sum(1)
        total = total + weights.w_bc * size / (masked.sum().clamp_min(1) * state.shape[1])
    return eps * total


def _energy(state: Tensor, spec: StateSpec) -> Tensor:
    """Size of the energy of a cell, ``[N, *S]`` float64."""
    if spec.energy is not None:
        return state[:, spec.energy].double().abs()
    assert spec.pressure is not None  # primitive variables have one
    gamma = spec.gamma.double().reshape(-1, *[1] * spec.ndim) if torch.is_tensor(spec.gamma) else spec.gamma
    velocity = state[:, list(spec.momentum)].double()
    kinetic = 0.5 * state[:, spec.density].double().abs() * velocity.square().sum(1)
    return state[:, spec.pressure].double().abs() / (gamma - 1.0) + kinetic
