"""The seed's analytical reward, function by function, on ``ttcfast.ops.arm``."""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast import ops
from ttcfast.ops.arm import ArmScores
from ttcfast.spec import ARMWeights, Momentum, Scale, StateSpec

__all__ = [
    "ARMWeights",
    "arm_score",
    "bc_violation_reward",
    "compute_pressure",
    "energy_conservation_reward",
    "integral",
    "mass_conservation_reward",
    "momentum_conservation_reward",
    "positivity_reward",
]


def arm_score(
    state_t: Tensor,
    cand_tp1: Tensor,
    dxdy: float | Tensor,
    bc_mask: Tensor | None,
    w: ARMWeights,
    *,
    spec: StateSpec | None = None,
    momentum: Momentum = "sum",
    scale: Scale = "absolute",
) -> Tensor:
    """Weighted sum of the penalties, negated: higher is better.

    Departs from the sketch in that every term is per candidate (DECISIONS, Test-time computing 1); at B = 1 it is the sketch.

    Args:
        state_t: the state being left, ``[C, *S]``, or ``[B, C, *S]`` with one row per candidate.
        cand_tp1: candidates, ``[B, C, *S]``.
        dxdy: cell volume, a number or ``[*S]``; None keeps that of ``spec``.
        bc_mask: bool, cells with a prescribed value, ``[*S]``; also ``[C, *S]`` or ``[B, C, *S]``, as the sketch indexes.
            None takes that of ``spec``.
        w: weights of the penalties.
        spec: channels, gamma and boundary values; None takes rho, rho u, E in as many dimensions as ``cand_tp1`` has.
        momentum: see ``ttcfast.ops.arm``.
        scale: see ``ttcfast.ops.arm``.

    Returns:
        ``[B]``; -inf for a candidate that is not finite. Differentiable in ``cand_tp1``.

    Raises:
        ValueError: shapes, channels, dtypes or devices do not fit.

    Source: seeds/ttc-integration-plan.md section 4.
    """
    spec = _spec(cand_tp1, spec, dxdy)
    if bc_mask is None or bc_mask.ndim == spec.ndim:
        mask = spec.boundary_mask if bc_mask is None else bc_mask
        return _scores(state_t, cand_tp1, spec.replace(boundary_mask=mask), w, momentum, scale).score
    # A mask with its own channels or candidates is beyond a StateSpec: that one term is computed here.
    score = _scores(state_t, cand_tp1, spec.replace(boundary_mask=None), w, momentum, scale).score
    violation = _masked_mean((cand_tp1 - _boundary_value(spec)).abs(), bc_mask)
    return torch.where(score.isfinite(), score - w.w_bc * violation.to(score.dtype), score)


def mass_conservation_reward(state_t: Tensor, cand_tp1: Tensor, dxdy: float | Tensor) -> Tensor:
    """Absolute change of the total mass, ``[B]``; arguments as in ``arm_score``. A penalty: lower is better."""
    return _scores(state_t, cand_tp1, _spec(cand_tp1, None, dxdy)).mass


def momentum_conservation_reward(state_t: Tensor, cand_tp1: Tensor, dxdy: float | Tensor, *, momentum: Momentum = "sum") -> Tensor:
    """Absolute change of the total momentum, ``[B]``, its components added first unless ``momentum`` says otherwise. A penalty."""
    return _scores(state_t, cand_tp1, _spec(cand_tp1, None, dxdy), momentum=momentum).momentum


def energy_conservation_reward(state_t: Tensor, cand_tp1: Tensor, dxdy: float | Tensor) -> Tensor:
    """Absolute change of the total energy, ``[B]``; arguments as in ``arm_score``. A penalty: lower is better."""
    return _scores(state_t, cand_tp1, _spec(cand_tp1, None, dxdy)).energy


def bc_violation_reward(cand_tp1: Tensor, bc_mask: Tensor | None) -> Tensor:
    """Mean absolute value over masked cells and channels, ``[B]``, 0 where nothing is masked. A penalty: lower is better.

    Args:
        cand_tp1: candidates, ``[B, C, *S]``.
        bc_mask: bool ``[*S]``, ``[C, *S]`` or ``[B, C, *S]``; None masks nothing.
    """
    if bc_mask is None:
        return cand_tp1.new_zeros(cand_tp1.shape[0])
    return _masked_mean(cand_tp1.abs(), bc_mask)


def positivity_reward(cand_tp1: Tensor) -> Tensor:
    """Mean of the negative part of the density plus that of the pressure, ``[B]``. A penalty: lower is better.

    ``cand_tp1`` is ``[B, C, *S]`` of rho, rho u, E with gamma 1.4.
    """
    return _scores(cand_tp1, cand_tp1, _spec(cand_tp1, None, 1.0)).positivity


def compute_pressure(state: Tensor, gamma: float = 1.4) -> Tensor:
    """Pressure of an ideal gas, ``(gamma - 1) (E - rho abs(u)^2 / 2)``, ``[B, *S]``, in the units of E.

    ``state`` is ``[B, C, *S]`` of rho, one momentum per dimension, E. Divides by ``rho + 1e-12`` as the sketch does.
    """
    spec = _spec(state, None, 1.0)
    rho, energy = state[:, spec.density], state[:, spec.energy]
    velocity = state[:, list(spec.momentum)] / (rho + 1e-12).unsqueeze(1)
    return (gamma - 1.0) * (energy - 0.5 * rho * (velocity * velocity).sum(1))


def integral(field: Tensor, dxdy: float | Tensor) -> Tensor:
    """``sum of field * dxdy`` over the last two axes, as the sketch has it; ``field`` is ``[..., H, W]``."""
    return (field * dxdy).sum(dim=(-2, -1))


def _spec(cand: Tensor, spec: StateSpec | None, dxdy: float | Tensor | None) -> StateSpec:
    """The caller's spec, or the sketch's channels, with this cell volume."""
    if spec is None:
        ndim = cand.ndim - 2
        if not 1 <= ndim <= 3:
            raise ValueError(f"cand_tp1 has shape {tuple(cand.shape)}; expected [B, C, *S] with 1 to 3 space axes")
        spec = StateSpec(0, tuple(range(1, ndim + 1)), ndim + 1, ndim=ndim)
    return spec if dxdy is None else spec.replace(cell_volume=dxdy)


def _scores(
    state: Tensor,
    cand: Tensor,
    spec: StateSpec,
    w: ARMWeights | None = None,
    momentum: Momentum = "sum",
    scale: Scale = "absolute",
) -> ArmScores:
    """One state for all candidates is one problem with B of them; a state per candidate is B problems with one each. ``[B]`` fields."""
    if state.ndim == cand.ndim - 1:
        found = ops.arm(state.unsqueeze(0), cand.unsqueeze(0), spec, w, momentum=momentum, scale=scale)
        return ArmScores(*(x.squeeze(0) for x in found))
    if state.ndim == cand.ndim and state.shape[0] == 1 != cand.shape[0]:
        return _scores(state[0], cand, spec, w, momentum, scale)
    if state.shape != cand.shape:
        raise ValueError(
            f"state_t has shape {tuple(state.shape)} and cand_tp1 {tuple(cand.shape)}; give [C, *S] or [B, C, *S] with [B, C, *S]"
        )
    if not state.shape[0]:
        raise ValueError(f"cand_tp1 has shape {tuple(cand.shape)}, so B = 0; give at least one candidate")
    found = ops.arm(state, cand.unsqueeze(1), spec, w, momentum=momentum, scale=scale)
    return ArmScores(*(x.squeeze(1) for x in found))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` ``[B, C, *S]`` where the mask, which broadcasts to them, is True; ``[B]``, 0 where it never is."""
    lead = values.ndim - mask.ndim
    if mask.dtype != torch.bool or lead < 0 or any(m not in (1, v) for m, v in zip(mask.shape, values.shape[lead:])):
        raise ValueError(f"bc_mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool that broadcasts to {tuple(values.shape)}")
    mask = mask.expand(values.shape)
    total = torch.where(mask, values, 0.0).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp_min(1)


def _boundary_value(spec: StateSpec) -> float | Tensor:
    return 0.0 if spec.boundary_value is None else spec.boundary_value
