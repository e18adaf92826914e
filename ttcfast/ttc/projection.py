"""Imposes on a new state what its layout declares: totals that are conserved, bounds, vector fields without divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttcfast.metrics.conservation import conserved_fields
from ttcfast.physics.equation_of_state import gamma_field, primitive_parts
from ttcfast.rewards.scorer import Project, ScoreContext
from ttcfast.spec import EulerSpec, FieldSpec, StateSpec
from ttcfast.transfer import indices, on_device

from .guardrails import finite_states

KINDS = ("conservation", "declared")
"""Values of ``TTCConfig.project``: totals alone, or all that ``StateSpec.fields`` declares."""

_ITERATIONS = 30  # steps of Newton's method with bisection; the total of clipped values is piecewise linear in the constant


def check_projectable(spec: StateSpec | None, kind: str = "conservation") -> StateSpec:
    """Return ``spec``; raise ``ValueError`` where there is nothing that a projection of this kind could impose."""
    if spec is None:
        raise ValueError(f"project is {kind!r} but the model has no StateSpec; wrap it in a Surrogate, or use project=None")
    if isinstance(spec, FieldSpec):
        declared = bool(spec.conserved or spec.mean_zero or (kind == "declared" and (spec.bounds or spec.divergence_free)))
        if not declared:
            wanted = "conserved= or mean_zero=" if kind == "conservation" else "conserved=, mean_zero=, bounds= or divergence_free="
            raise ValueError(f"project is {kind!r} but the layout declares nothing of that kind; give {wanted}, or use project=None")
        if kind == "declared" and spec.divergence_free and not all(spec.periodic_axes):
            raise ValueError(
                f"project is 'declared' and divergence_free is {spec.divergence_free} on a domain with periodic={spec.periodic}; the "
                "projection is spectral and needs every axis periodic, so use project='conservation', or project=None"
            )
        return spec
    assert isinstance(spec, EulerSpec)
    if spec.variables != "conserved":
        raise ValueError(
            f"project is {kind!r} but the states are {spec.variables}; conservation can be imposed on conserved channels only, "
            "so convert the states or use project=None"
        )
    if not spec.conserved_channels:
        raise ValueError(
            f"project is {kind!r} but the domain is open (periodic={spec.periodic}, closed={spec.closed}); what crosses its boundary "
            "is not conserved, so use project=None, or StateSpec(closed=True) where all sides are walls"
        )
    return spec


def project_conservation(state: Tensor, new: Tensor, spec: StateSpec) -> tuple[Tensor, Tensor]:
    """Give ``new`` the totals of ``state`` in every conserved channel by adding one constant per channel.

    ``new_c - sum(volume * (new_c - state_c)) / sum(volume)`` is the smallest change (in the volume-weighted square) that conserves, exact
    to rounding. Per-cell differences are summed in float64. Channels of mean zero lose their mean. The raw state is kept where it is
    physical (a gas of positive density and pressure, other fields within their bounds) and would become unphysical.

    Args:
        state: State being left, ``[N, C, *S]``.
        new: Its successor, same shape; not changed.
        spec: Layout with conserved variables on a periodic or closed domain, or fields with conserved quantities.

    Returns:
        The projected state ``[N, C, *S]``, and bool ``[N]``, whether the raw one was kept.

    Raises:
        ValueError: The layout is primitive or open, or declares nothing conserved.

    Source: docs/design/decisions.md ("Conservation projection").
    """
    check_projectable(spec)
    kept = spec.conserved_channels, _means(spec)
    channels, means, both = (indices(c, new.device) for c in (*kept, kept[0] + kept[1]))
    volume = on_device(spec.cell_volume, new.device, torch.float64)
    total = volume.expand(new.shape[2:]).sum()
    difference = (new[:, channels] - state[:, channels]).double()
    residual = torch.cat([_sums(difference, volume), _sums(new[:, means].double(), volume)], 1) / total  # [N, channels]
    projected = new.clone()
    projected[:, both] -= residual.to(new.dtype).reshape(*residual.shape, *[1] * spec.ndim)
    return _where_physical(new, projected, spec)


def project_declared(state: Tensor, new: Tensor, spec: StateSpec) -> tuple[Tensor, Tensor]:
    """Give ``new`` all that its layout declares.

    Vector fields without divergence lose the gradient part of their Helmholtz decomposition, computed by Fourier transform. Then conserved
    channels get the totals of ``state``, channels of mean zero lose their mean, and bounded channels are moved into their bounds: to the
    nearest values (in the volume-weighted square) that have both the total and the bounds. Where no values within the bounds have that
    total, the raw state is kept. Clipping the components of a vector field gives them a divergence again. A gas gets its totals, as by
    ``project_conservation``.

    Arguments, results and errors are as for ``project_conservation``; vector fields without divergence need periodic axes.
    """
    check_projectable(spec, "declared")
    if not isinstance(spec, FieldSpec):
        return project_conservation(state, new, spec)
    projected = new.clone()
    given = set(spec.given_channels)
    for vector in (indices(vector, new.device) for vector in spec.solenoidal if not given & set(vector)):
        projected[:, vector] = without_divergence(new[:, vector].double(), spec.distances).to(new.dtype)
    volume = on_device(spec.cell_volume, new.device, torch.float64)
    whole, bounds, means = volume.expand(new.shape[2:]).sum(), spec.bounded_channels, _means(spec)
    impossible = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    for channel in sorted({*spec.conserved_channels, *means, *bounds} - given):
        x = projected[:, channel].double()
        low, high = (math.copysign(math.inf, sign) if end is None else end for end, sign in zip(bounds.get(channel, (None, None)), (-1, 1)))
        if channel in spec.conserved_channels or channel in means:
            gap = -x if channel in means else state[:, channel].double() - x
            missing = _sums(gap.unsqueeze(1), volume)[:, 0] / whole  # in the mean
            if channel in bounds:
                wanted = missing + _sums(x.unsqueeze(1), volume)[:, 0] / whole
                rounding = torch.finfo(new.dtype).eps * (
                    x.abs().flatten(1).amax(1) + max(abs(end) for end in (low, high) if math.isfinite(end))
                )
                impossible |= (wanted < low - rounding) | (wanted > high + rounding)
                missing = _constant(x, wanted.clamp(low, high), volume / whole, low, high)
            x = x + missing.reshape(-1, *[1] * spec.ndim)
        projected[:, channel] = x.clamp(low, high).to(new.dtype)
    return torch.where(_over(impossible, new), new, projected), impossible


def without_divergence(u: Tensor, distances: tuple[float, ...]) -> Tensor:
    """Remove the gradient part of periodic vector fields.

    Args:
        u: Components ``[N, D, *S]``, float64, one per space axis.
        distances: Distance of cells along each axis.

    Returns:
        ``[N, D, *S]``: the nearest field whose spectral divergence is zero. The shortest waves of an even number of
        cells, whose derivative the grid cannot tell, count as constant along their axis.
    """
    space = u.shape[2:]
    waves = []
    for axis, (n, h) in enumerate(zip(space, distances, strict=True)):
        last = axis == len(space) - 1
        k = (torch.fft.rfftfreq if last else torch.fft.fftfreq)(n, d=h, dtype=torch.float64, device=u.device)
        if n % 2 == 0:
            k[n // 2].zero_()
        waves.append(k.reshape(-1, *[1] * (len(space) - 1 - axis)))
    axes = tuple(range(2, u.ndim))
    amplitudes = torch.fft.rfftn(u, dim=axes)
    square = sum(k * k for k in waves)
    assert isinstance(square, Tensor)
    along = sum(k * amplitudes[:, axis] for axis, k in enumerate(waves)) / torch.where(square > 0, square, 1.0)
    gradient = torch.stack([k * along for k in waves], 1)
    found: Tensor = torch.fft.irfftn(amplitudes - gradient, s=space, dim=axes)
    return found


def project(kind: str, state: Tensor, new: Tensor, spec: StateSpec) -> tuple[Tensor, Tensor]:
    """``project_conservation`` or ``project_declared``, by the value of ``TTCConfig.project``."""
    return (project_declared if kind == "declared" else project_conservation)(state, new, spec)


def projector(spec: StateSpec, kind: str) -> Project:
    """``project`` for groups of candidates, for scorers that score projected states."""

    layouts: dict[torch.device, StateSpec] = {}  # tensors of the layout move to a device once

    def of_group(state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        if state.device not in layouts:
            layouts[state.device] = spec.to(state.device)
        b = candidates.shape[1]
        own = layouts[state.device].of_problems(None if context is None else context.problem_ids, b)
        projected, _ = project(kind, state.repeat_interleave(b, 0), candidates.flatten(0, 1), own)
        return projected.view_as(candidates)

    return of_group


def _means(spec: StateSpec) -> tuple[int, ...]:
    return tuple(spec.names.index(name) for name in spec.mean_zero) if isinstance(spec, FieldSpec) else ()


def _sums(fields: Tensor, volume: Tensor) -> Tensor:
    return (fields * volume).flatten(2).sum(2)


def _over(flags: Tensor, states: Tensor) -> Tensor:
    return flags.reshape(-1, *[1] * (states.ndim - 1))


def _where_physical(new: Tensor, projected: Tensor, spec: StateSpec) -> tuple[Tensor, Tensor]:
    keep = physical(new, spec) & ~physical(projected, spec)
    return torch.where(_over(keep, new), new, projected), keep


def _constant(x: Tensor, wanted: Tensor, share: Tensor, low: float, high: float) -> Tensor:
    """Return the constant per state that gives ``x [N, *S]``, after shift and clipping, the mean ``wanted [N]``; ``share`` is per cell."""
    flat, share = x.flatten(1), share.expand(x.shape[1:]).reshape(-1)
    wanted = wanted.clamp(low, high)
    least = (wanted if low == -math.inf else torch.full_like(wanted, low)) - flat.amax(1)
    most = (wanted if high == math.inf else torch.full_like(wanted, high)) - flat.amin(1)
    constant = (wanted - (flat * share).sum(1)).clamp(least, most)
    for _ in range(_ITERATIONS):
        raised = flat + constant.unsqueeze(1)
        missing = wanted - (raised.clamp(low, high) * share).sum(1)
        least, most = torch.where(missing > 0, constant, least), torch.where(missing > 0, most, constant)
        free = (((raised > low) & (raised < high)) * share).sum(1)
        newton = constant + missing / free.clamp_min(1e-300)
        inside = (free > 0) & (newton >= least) & (newton <= most)
        constant = torch.where(inside, newton, (least + most) / 2)
    return constant


def stays_physical(before: Tensor, after: Tensor, spec: StateSpec | None, context: ScoreContext | None) -> Tensor:
    """Whether states ``[N, B, C, *S]`` are finite and none has become unphysical, bool ``[N, B]``.

    Args:
        before: What they were, ``[N, B, C, *S]``, or ``[N, 1, C, *S]`` for all.
        after: What they are now.
        spec: Layout that says what is physical; None checks for finite values only.
        context: Context with the problem ids, for a gamma per problem.
    """
    finite = finite_states(after, 2)
    if spec is None:
        return finite
    ids = None if context is None else context.problem_ids
    was, still = (physical(x.flatten(0, 1), spec.of_problems(ids, x.shape[1])).view(x.shape[:2]) for x in (before, after))
    return finite & (still | ~was)


def physical(state: Tensor, spec: StateSpec) -> Tensor:
    """Whether all cells are physical, bool ``[N]``: density and pressure of a gas positive, other fields finite and within their bounds."""
    if isinstance(spec, EulerSpec):
        fields = conserved_fields(state, spec)
        rho, _, pressure = primitive_parts(fields, gamma_field(spec.gamma, fields))
        return ((rho > 0) & (pressure > 0)).flatten(1).all(1)
    found = finite_states(state)
    for channel, (low, high) in spec.bounded_channels.items() if isinstance(spec, FieldSpec) else ():
        x = state[:, channel].flatten(1)
        found = found & (True if low is None else x.amin(1) >= low) & (True if high is None else x.amax(1) <= high)
    return found
