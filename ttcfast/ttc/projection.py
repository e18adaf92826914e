"""Imposes conservation by removing the mean residual of each conserved channel from a new state."""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast.metrics.conservation import conserved_fields
from ttcfast.physics.equation_of_state import gamma_field, primitive_parts
from ttcfast.rewards.scorer import Project, ScoreContext
from ttcfast.spec import StateSpec

from .guardrails import finite_states


def check_projectable(spec: StateSpec | None) -> StateSpec:
    """Return ``spec``; raise ``ValueError`` without a layout, in primitive variables or on an open domain."""
    if spec is None:
        raise ValueError("project is 'conservation' but the model has no StateSpec; wrap it in a Surrogate, or use project=None")
    if spec.variables != "conserved":
        raise ValueError(
            f"project is 'conservation' but the states are {spec.variables}; conservation can be imposed on conserved channels only, "
            "so convert the states or use project=None"
        )
    if not spec.conserved_channels:
        raise ValueError(
            f"project is 'conservation' but the domain is open (periodic={spec.periodic}, closed={spec.closed}); what crosses its boundary "
            "is not conserved, so use project=None, or StateSpec(closed=True) where all sides are walls"
        )
    return spec


def project_conservation(state: Tensor, new: Tensor, spec: StateSpec) -> tuple[Tensor, Tensor]:
    """Give ``new`` the totals of ``state`` in every conserved channel by adding one constant per channel.

    ``new_c - sum(volume * (new_c - state_c)) / sum(volume)`` is the smallest change (in the volume-weighted square) that conserves, exact
    to rounding. Per-cell differences are summed in float64. The raw state is kept where a density or pressure that is positive everywhere
    would become negative.

    Args:
        state: State being left, ``[N, C, *S]``.
        new: Its successor, same shape; not changed.
        spec: Layout with conserved variables on a periodic or closed domain.

    Returns:
        The projected state ``[N, C, *S]``, and bool ``[N]``, whether the raw one was kept.

    Raises:
        ValueError: The layout is primitive or open.

    Source: docs/design/decisions.md ("Conservation projection").
    """
    check_projectable(spec)
    channels = list(spec.conserved_channels)
    volume = torch.as_tensor(spec.cell_volume, dtype=torch.float64, device=new.device)
    total = volume.expand(new.shape[2:]).sum()
    difference = (new[:, channels] - state[:, channels]).double()
    residual = (difference * volume).flatten(2).sum(2) / total  # [N, channels]
    projected = new.clone()
    projected[:, channels] -= residual.to(new.dtype).reshape(*residual.shape, *[1] * spec.ndim)
    keep = positive(new, spec) & ~positive(projected, spec)
    return torch.where(keep.reshape(-1, *[1] * (new.ndim - 1)), new, projected), keep


def projector(spec: StateSpec) -> Project:
    """``project_conservation`` for groups of candidates, for scorers that score projected states."""

    def project(state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        b = candidates.shape[1]
        own = spec_of_problems(spec, None if context is None else context.problem_ids, b)
        projected, _ = project_conservation(state.repeat_interleave(b, 0), candidates.flatten(0, 1), own)
        return projected.view_as(candidates)

    return project


def spec_of_problems(spec: StateSpec, problem_ids: Tensor | None, repeats: int = 1) -> StateSpec:
    """The layout with the gammas of these problems, each repeated for its candidates. Without ids it has those of all, in order."""
    gamma = spec.gamma
    if not torch.is_tensor(gamma) or gamma.numel() == 1:
        return spec
    own = gamma if problem_ids is None else gamma[problem_ids.to(gamma.device)]
    return spec.replace(gamma=own.repeat_interleave(repeats))


def stays_physical(before: Tensor, after: Tensor, spec: StateSpec | None, context: ScoreContext | None) -> Tensor:
    """Whether states ``[N, B, C, *S]`` are finite and have lost no positive density or pressure, bool ``[N, B]``.

    Args:
        before: What they were, ``[N, B, C, *S]``, or ``[N, 1, C, *S]`` for all.
        after: What they are now.
        spec: Layout by which density and pressure are found; None checks for finite values only.
        context: Context with the problem ids, for a gamma per problem.
    """
    finite = finite_states(after, 2)
    if spec is None:
        return finite
    ids = None if context is None else context.problem_ids
    was, still = (positive(x.flatten(0, 1), spec_of_problems(spec, ids, x.shape[1])).view(x.shape[:2]) for x in (before, after))
    return finite & (still | ~was)


def positive(state: Tensor, spec: StateSpec) -> Tensor:
    """Whether density and pressure are positive in every cell, bool ``[N]``; False where the state is not finite."""
    fields = conserved_fields(state, spec)
    rho, _, pressure = primitive_parts(fields, gamma_field(spec.gamma, fields))
    return ((rho > 0) & (pressure > 0)).flatten(1).all(1)
