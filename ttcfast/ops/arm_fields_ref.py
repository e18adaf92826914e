"""The definition of the analytical reward of declared fields, in pure torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .arm_ref import SCALE_GUARD


class FieldCall(NamedTuple):
    """The flattened arguments, in the order of the torch schema. Lists have one entry per channel unless stated otherwise."""

    state: Tensor  # [N, C, *S]
    candidates: Tensor  # [N, B, C, *S]
    volumes: Tensor | None  # [*S]
    volume: float
    mask: Tensor | None  # bool [*S]
    values: Tensor | None  # broadcasts to [C, *S]
    value: float
    expected: Tensor | None  # float64 [N, C], change of each channel's integral over the step
    groups: list[int]  # index of the channel's conserved quantity; -1 for none
    quantities: int  # number of conserved quantities
    anchored: list[int]  # 1 to penalise the integral's change, 0 to penalise the integral itself
    low: list[float]  # -inf for no bound
    high: list[float]  # inf for no bound
    vectors: list[int]  # channels of the divergence-free fields, one per space dimension and field
    distances: list[float]  # cell spacings, one per space dimension
    periodic: list[int]  # one per space dimension
    mode: str
    scale: str
    weights: list[float]  # of the quantities, then of boundary, bounds and divergence

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.state.dtype == torch.float64 else torch.float32

    @property
    def space(self) -> torch.Size:
        return self.state.shape[2:]

    @property
    def fields(self) -> int:
        """Number of divergence-free fields."""
        return len(self.vectors) // len(self.distances)

    @property
    def inner_cells(self) -> int:
        """Number of cells that have both neighbours along every axis."""
        return math.prod(n if wraps else max(n - 2, 0) for n, wraps in zip(self.space, self.periodic))


def arm_fields_ref(call: FieldCall) -> tuple[Tensor, ...]:
    """The definition, in torch. Differentiable by autograd; allocates temporaries of the candidates' size."""
    new = call.candidates.flatten(3).to(call.accumulator)  # [N, B, C, L]
    old = call.state.flatten(2).to(call.accumulator).unsqueeze(1)  # [N, 1, C, L]
    # channel by channel, since a tensor of flags or bounds would be copied to the device
    before = torch.stack([x if anchored else torch.zeros_like(x) for x, anchored in zip(old.unbind(2), call.anchored)], 2)
    changes = _volume(call) * (new - before)
    terms = [changes, _away(call, new).sum(2, keepdim=True), _outside(call, new).sum(2, keepdim=True)]
    # One sum over all terms, cells innermost: torch never splits it over threads, so its order is the same for any N and B.
    sums = torch.cat(terms, 2).sum(-1, dtype=torch.float64)  # [N, B, C + 2]
    divergence = _slopes(call, call.candidates).sum(3).abs().flatten(2).sum(-1, dtype=torch.float64)
    return _finish(call, sums, divergence, new.detach().isfinite().flatten(2).all(-1))


def _volume(call: FieldCall) -> Tensor | float:
    return call.volume if call.volumes is None else call.volumes.to(call.accumulator).expand(call.space).reshape(-1)


def _away(call: FieldCall, new: Tensor) -> Tensor:
    """Return abs(candidate - prescribed value) in masked cells and 0 elsewhere, ``[N, B, C, L]``."""
    if call.mask is None:
        return torch.zeros_like(new)
    value = call.value if call.values is None else call.values.to(call.accumulator).expand(call.state.shape[1:]).flatten(1)
    return torch.where(call.mask.reshape(-1), (new - value).abs(), 0.0)


def _outside(call: FieldCall, new: Tensor) -> Tensor:
    """Return the distance of each value from its channel's interval, ``[N, B, C, L]``."""
    return torch.stack([torch.relu(low - x) + torch.relu(x - high) for x, low, high in zip(new.unbind(2), call.low, call.high)], 2)


def _slopes(call: FieldCall, x: Tensor) -> Tensor:
    """Return central differences of each component along its axis, 0 without both neighbours, ``[N, B, C, *S]`` to ``[N, B, F, D, *S]``."""
    d, slopes = len(call.distances), []
    if not call.vectors:
        return x.new_zeros(*x.shape[:2], 0, d, *call.space, dtype=call.accumulator)
    for k, h in enumerate(call.distances):
        # channel by channel, since an index of several would be copied to the device
        u, axis = torch.stack([x[:, :, c].to(call.accumulator) for c in call.vectors[k::d]], 2), k - d
        slopes.append((u.roll(-1, axis) - u.roll(1, axis)) * (0.5 / h))
    inside = torch.ones(tuple(call.space), dtype=torch.bool, device=x.device)
    for axis in (axis for axis, wraps in enumerate(call.periodic) if not wraps):
        for end in (0, -1):
            inside.select(axis, end).fill_(False)
    return torch.where(inside, torch.stack(slopes, 3), 0.0)


def scales(call: FieldCall) -> tuple[Tensor | None, Tensor | None]:
    """Return units of the quantities' residuals, ``[N, quantities]``, and of the divergence, ``[N]``, float64; None for absolute penalties.

    A quantity's unit is the integral over the state of its magnitude, abs(x) or the vector's length. The divergence's unit is the sum over
    cells of the absolute slopes that it adds up, so that 1 means no cancellation. A state that is exactly 0 there has no unit of its own:
    a quantity is then measured by the volume, and the divergence as without a scale.
    """
    if call.scale == "absolute":
        return None, None
    u = call.state.detach().to(call.accumulator)
    volume, cells = _volume(call), math.prod(call.space)
    whole = volume.sum(dtype=torch.float64) if torch.is_tensor(volume) else volume * cells
    units = []
    for number in range(call.quantities):
        x = torch.stack([u[:, c] for c, group in enumerate(call.groups) if group == number], 1).flatten(2)
        units.append((volume * (x * x).sum(1).sqrt()).sum(-1, dtype=torch.float64))
    of_quantities = torch.stack(units, 1) if units else u.new_zeros((len(u), 0), dtype=torch.float64)
    slopes = _slopes(call, u.unsqueeze(1))[:, 0].abs().flatten(1).sum(-1, dtype=torch.float64)
    of_quantities = torch.where(of_quantities == 0, whole, of_quantities.clamp_min(SCALE_GUARD * whole))
    return of_quantities, torch.where(slopes == 0, max(call.fields * call.inner_cells, 1), slopes.clamp_min(SCALE_GUARD * cells))


def _finish(call: FieldCall, sums: Tensor, divergence: Tensor, finite: Tensor) -> tuple[Tensor, ...]:
    """Compute penalties and score from the sums, in float64. Other implementations use the same arithmetic in the same order."""
    channels, cells = call.state.shape[1], math.prod(call.space)
    residuals = sums[..., :channels]
    if call.expected is not None:
        residuals = residuals - call.expected.unsqueeze(1)
    units, slope = scales(call)
    parts = []
    for number, components in enumerate(_components(call)):
        part = _combined(call.mode, torch.stack([residuals[..., c] for c in components], -1))
        parts.append(part if units is None else part / units[:, number : number + 1])
    masked = 1.0 if call.mask is None else call.mask.sum().clamp_min(1) * channels
    roughness = divergence / max(call.fields * call.inner_cells, 1) if slope is None else divergence / slope.unsqueeze(1)
    parts += [sums[..., channels] / masked, sums[..., channels + 1] / cells, roughness]
    penalties = [torch.where(finite & ~p.isnan(), p, math.inf) for p in parts]
    total = cast(Tensor, sum(w * p for w, p in zip(call.weights, penalties)))
    score = torch.where(total.isfinite(), -total, -math.inf)
    return score.to(call.accumulator), torch.stack(penalties, -1).to(call.accumulator), finite


def _components(call: FieldCall) -> Iterator[list[int]]:
    """Return the channels of each quantity."""
    for number in range(call.quantities):
        yield [c for c, group in enumerate(call.groups) if group == number]


def _combined(mode: str, residuals: Tensor) -> Tensor:
    if mode == "sum":
        return residuals.sum(-1).abs()
    return residuals.abs().sum(-1) if mode == "components" else torch.linalg.vector_norm(residuals, dim=-1)
