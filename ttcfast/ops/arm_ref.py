"""The definition of the analytical reward and its gradient, in pure torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

VELOCITY_GUARD = 1e-12  # the TTC plan's compute_pressure divides by rho + 1e-12
SCALE_GUARD = 1e-12  # smallest denominator of a relative residual, times the domain's volume


class Call(NamedTuple):
    """The flattened arguments, in the order of the torch schema. A channel of -1 is absent; a tensor overrides the number it pairs with."""

    state: Tensor  # [N, C, *S]
    candidates: Tensor  # [N, B, C, *S]
    gammas: Tensor | None  # [N]
    gamma: float
    volumes: Tensor | None  # [*S]
    volume: float
    mask: Tensor | None  # bool [*S]
    values: Tensor | None  # broadcasts to [C, *S]
    value: float
    expected: Tensor | None  # float64 [N, components + 2], change of the integrals over the step; None if they are conserved
    density: int
    velocity: list[int]  # momentum channels; velocity channels of primitive states
    energy: int
    pressure: int
    primitive: bool
    mode: str
    scale: str
    weights: list[float]

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.state.dtype == torch.float64 else torch.float32

    @property
    def space(self) -> torch.Size:
        return self.state.shape[2:]


def arm_ref(call: Call) -> tuple[Tensor, ...]:
    """The definition, in torch. Differentiable by autograd; allocates many temporaries of the candidates' size."""
    dtype = call.accumulator
    volume = call.volume if call.volumes is None else call.volumes.to(dtype).expand(call.space).reshape(-1)
    new = call.candidates.flatten(3).to(dtype)  # [N, B, C, L]
    old = call.state.flatten(2).to(dtype).unsqueeze(1)  # [N, 1, C, L]
    terms = [volume * change for change in _changes(call, new, old)]
    terms.append(torch.zeros_like(terms[0]) if call.mask is None else _boundary(call, new).sum(2))
    terms += [torch.relu(-new[:, :, call.density]), torch.relu(-_pressure(call, new))]
    # One sum over all terms, cells innermost: torch never splits it over threads, so its order is the same for any N and B.
    sums = torch.stack(terms, 2).sum(-1, dtype=torch.float64)  # [N, B, components + 5]
    finite = new.detach().isfinite().flatten(2).all(-1)
    return _finish(call, sums, finite)


def _changes(call: Call, new: Tensor, old: Tensor) -> list[Tensor]:
    """Return per-cell changes of rho, each momentum and E, ``[N, B, L]``; products are differenced by factor to avoid cancellation."""
    d = new - old
    d_rho = d[:, :, call.density]
    if not call.primitive:
        return [d_rho, *(d[:, :, k] for k in call.velocity), d[:, :, call.energy]]
    rho, rho_old = new[:, :, call.density], old[:, :, call.density]
    changes = [d_rho, *(rho * d[:, :, k] + old[:, :, k] * d_rho for k in call.velocity)]
    if call.energy >= 0:
        return [*changes, d[:, :, call.energy]]
    u, du, u_old = (_velocity(call, x) for x in (new, d, old))
    kinetic = 0.5 * ((u * u).sum(2) * d_rho + rho_old * (du * (u + u_old)).sum(2))
    return [*changes, d[:, :, call.pressure] / (_gamma(call) - 1) + kinetic]


def _gamma(call: Call) -> Tensor | float:
    """Return a number, or [N or 1, 1, 1] to broadcast against [N, B, L]."""
    return call.gamma if call.gammas is None else call.gammas.to(call.accumulator).reshape(-1, 1, 1)


def _pressure(call: Call, u: Tensor) -> Tensor:
    """Return the stored pressure, or the TTC plan's compute_pressure, ``[N, B, L]``."""
    if call.pressure >= 0:
        return u[:, :, call.pressure]
    rho, v = u[:, :, call.density], _velocity(call, u) / (u[:, :, call.density, None] + VELOCITY_GUARD)
    return (_gamma(call) - 1) * (u[:, :, call.energy] - 0.5 * rho * (v * v).sum(2))


def _velocity(call: Call, u: Tensor) -> Tensor:
    """Return momentum or velocity, ``[N, B, d, L]``; not by a list of channels, which would be copied to the device."""
    return torch.stack([u[:, :, c] for c in call.velocity], 2)


def _boundary(call: Call, new: Tensor) -> Tensor:
    """Return abs(candidate - value) in masked cells and 0 elsewhere, ``[N, B, C, L]``."""
    mask = cast(Tensor, call.mask).reshape(-1)
    return torch.where(mask, (new - _values(call)).abs(), 0.0)


def _values(call: Call) -> Tensor | float:
    """Return a number, or [C, L]."""
    if call.values is None:
        return call.value
    return call.values.to(call.accumulator).expand(call.state.shape[1:]).flatten(1)


def scales(call: Call) -> Tensor | None:
    """Return the denominators of the mass, momentum and energy residuals, ``[N, 3]`` float64; None for absolute residuals."""
    if call.scale == "absolute":
        return None
    u = call.state.detach().flatten(2).to(call.accumulator).unsqueeze(1)  # [N, 1, C, L]
    rho, p = u[:, :, call.density], _pressure(call, u)
    m = _velocity(call, u)
    energy = u[:, :, call.energy] if call.energy >= 0 else p / (_gamma(call) - 1) + 0.5 * rho * (m * m).sum(2)
    if call.primitive:
        m = rho.unsqueeze(2) * m
    sound = (_gamma(call) * torch.relu(p) * torch.relu(rho)).sqrt()  # rho c
    volume = (
        torch.as_tensor(call.volume, dtype=u.dtype) if call.volumes is None else call.volumes.to(u.dtype).expand(call.space).reshape(-1)
    )
    terms = torch.stack([rho.abs(), (m * m).sum(2).sqrt() + sound, energy.abs()], 2) * volume  # [N, 1, 3, L]
    total = volume.to(torch.float64).expand(rho.shape[-1]).sum()
    return terms.sum(-1, dtype=torch.float64).squeeze(1).clamp_min(SCALE_GUARD * total)


def _finish(call: Call, sums: Tensor, finite: Tensor) -> tuple[Tensor, ...]:
    """Compute penalties and score from the sums, in float64. Other implementations use the same arithmetic in the same order."""
    m, cells = len(call.velocity), math.prod(call.space)
    residuals, boundary, negative = sums[..., : m + 2], sums[..., m + 2], sums[..., m + 3] + sums[..., m + 4]
    if call.expected is not None:
        residuals = residuals - call.expected.unsqueeze(1)
    scale = scales(call)
    per = [1.0, 1.0, 1.0] if scale is None else list(scale.unsqueeze(1).unbind(-1))
    parts = [
        residuals[..., 0].abs() / per[0],
        _momentum(call.mode, residuals[..., 1:-1]) / per[1],
        residuals[..., -1].abs() / per[2],
        boundary / _boundary_values(call),
        negative / cells,
    ]
    penalties = [torch.where(finite & ~p.isnan(), p, math.inf) for p in parts]
    total = sum(w * p for w, p in zip(call.weights, penalties))
    score = torch.where(cast(Tensor, total).isfinite(), -cast(Tensor, total), -math.inf)
    return (*(x.to(call.accumulator) for x in (score, *penalties)), finite, residuals.contiguous())


def _boundary_values(call: Call) -> Tensor | float:
    """Return the number of values that the boundary term averages, at least 1 so that an empty mask gives 0."""
    return 1.0 if call.mask is None else call.mask.sum().clamp_min(1) * call.state.shape[1]


def _momentum(mode: str, residuals: Tensor) -> Tensor:
    if mode == "sum":
        return residuals.sum(-1).abs()
    return residuals.abs().sum(-1) if mode == "components" else torch.linalg.vector_norm(residuals, dim=-1)


def arm_backward(call: Call, score: Tensor, residuals: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """Return the gradient with respect to the candidates, ``[N, B, C, *S]``.

    Args:
        call: Arguments of the forward pass.
        score: Its first output, ``[N, B]``; the gradient is 0 where it is -inf.
        residuals: Its last output, ``[N, B, components + 2]``.
        grads: Gradients of score, mass, momentum, energy, boundary and positivity, ``[N, B]`` each or None.
    """
    by_mass, by_momentum, by_energy, by_boundary, by_positivity = _penalty_gradients(call, score, grads)
    new = call.candidates.flatten(3).to(call.accumulator)  # [N, B, C, L]
    pull = torch.cat(
        [
            (by_mass * residuals[..., 0].sign()).unsqueeze(-1),
            by_momentum.unsqueeze(-1) * _momentum_gradient(call.mode, residuals[..., 1:-1]),
            (by_energy * residuals[..., -1].sign()).unsqueeze(-1),
        ],
        -1,
    )
    scale = scales(call)
    if scale is not None:
        m = len(call.velocity)
        pull = pull / torch.cat([scale[:, :1], scale[:, 1:2].expand(-1, m), scale[:, 2:]], 1).unsqueeze(1)
    volume = call.volume if call.volumes is None else call.volumes.to(new.dtype).expand(call.space).reshape(-1)
    rows = _conservation_rows(call, new, [volume * p.unsqueeze(-1) for p in pull.to(new.dtype).unbind(-1)])
    for channel, row in _positivity_rows(call, new, by_positivity.to(new.dtype).unsqueeze(-1) / new.shape[-1]):
        rows[channel] = rows[channel] + row if channel in rows else row
    zero = torch.zeros_like(new[:, :, 0])
    grad = torch.stack([rows.get(c, zero) for c in range(new.shape[2])], 2)
    if call.mask is not None:
        away = torch.where(call.mask.reshape(-1), (new - _values(call)).sign(), 0.0)
        grad = grad + away * (by_boundary / _boundary_values(call)).to(new.dtype)[..., None, None]
    grad = torch.where(
        score.isfinite()[..., None, None], grad, 0.0
    )  # upstream gradients may be NaN or infinite, and 0 times those is not 0
    return grad.to(call.candidates.dtype).reshape(call.candidates.shape)


def _penalty_gradients(call: Call, score: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the gradient reaching each penalty, directly and through the score, ``[N, B]`` float64."""
    by_score, *direct = [torch.zeros_like(score) if g is None else g for g in grads]
    alive = score.isfinite()
    return [torch.where(alive, g.double() - w * by_score.double(), 0.0) for w, g in zip(call.weights, direct)]


def _momentum_gradient(mode: str, residuals: Tensor) -> Tensor:
    if mode == "sum":
        return residuals.sum(-1, keepdim=True).sign().expand_as(residuals)
    if mode == "components":
        return residuals.sign()
    norm = torch.linalg.vector_norm(residuals, dim=-1, keepdim=True)
    return torch.where(norm > 0, residuals / norm, 0.0)


def _conservation_rows(call: Call, u: Tensor, pull: list[Tensor]) -> dict[int, Tensor]:
    """Return gradient rows ``[N, B, L]`` by channel, from the gradients of rho, each momentum and E per cell."""
    mass, *momenta, energy = pull
    whole = torch.ones_like(u[:, :, 0])
    if not call.primitive:
        return {c: p * whole for c, p in zip([call.density, *call.velocity, call.energy], pull)}
    rho, rows = u[:, :, call.density], {call.density: mass * whole}
    for k, p in zip(call.velocity, momenta):
        rows[call.density] = rows[call.density] + p * u[:, :, k]
        rows[k] = p * rho
    if call.energy >= 0:
        return {**rows, call.energy: energy * whole}
    for k in call.velocity:
        rows[call.density] = rows[call.density] + energy * 0.5 * u[:, :, k] ** 2
        rows[k] = rows[k] + energy * rho * u[:, :, k]
    return {**rows, call.pressure: energy / (_gamma(call) - 1) * whole}


def _positivity_rows(call: Call, u: Tensor, pull: Tensor) -> list[tuple[int, Tensor]]:
    """Return gradient rows of relu(-rho) + relu(-p) per cell, as (channel, ``[N, B, L]``)."""
    rho = u[:, :, call.density]
    dense = -pull * (rho < 0)
    thin = -pull * (_pressure(call, u) < 0)
    if call.pressure >= 0:
        return [(call.density, dense), (call.pressure, thin)]
    heat = thin * (_gamma(call) - 1)
    guarded = rho + VELOCITY_GUARD
    rows = [(call.density, dense), (call.energy, heat)]
    for k in call.velocity:
        v = u[:, :, k] / guarded
        rows.append((k, -heat * rho * v / guarded))
        rows.append((call.density, heat * v * v * (rho / guarded - 0.5)))
    return rows
