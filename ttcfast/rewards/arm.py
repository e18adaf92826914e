"""Scores candidates by physics: ``ARMScorer`` for controllers, and the plan's reward functions one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ttcfast import ops
from ttcfast.checks import one_of
from ttcfast.ops.arm import ArmScores, Weights
from ttcfast.ops.arm_common import MOMENTA, SCALES
from ttcfast.ops.arm_fields import FieldScores
from ttcfast.spec import ARMWeights, EulerSpec, Momentum, Scale, StateSpec
from ttcfast.transfer import indices, sent

from .rounding import arm_spread_floor
from .scorer import ScoreContext, Scorer, grouped

__all__ = [
    "ARMScorer",
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


Budget: TypeAlias = Callable[[Tensor, ScoreContext | None], Tensor]


class ARMScorer(Scorer):
    """Analytical reward: minus the weighted conservation, boundary and positivity penalties of ``ttcfast.ops.arm``.

    Departs from the plan in its defaults, under which momentum errors cannot cancel and penalties have no units; pass
    ``momentum="sum", scale="absolute"`` for the plan's reward.

    Args:
        weights: Weight of each penalty, by name or as ``ARMWeights``; None means the defaults of ``ttcfast.ops.arm``.
        dxdy: Cell volume, a number or ``[*S]``; None means that of ``spec``.
        bc_mask: Cells with a prescribed value, bool ``[*S]``; None means those of ``spec``.
        spec: Layout of the states, in physical units; None means ``StateSpec.euler2d()``. A gamma per problem is selected by the
            context's problem ids; without a context it belongs to the states in order. Fields of other physics are scored by what
            ``StateSpec.fields`` declares of them.
        budgets: Expected change over one step of conserved quantities by name, for forced and open systems, in units of the integral: a
            number, a tensor with one value (or one per component) for each problem, selected by problem ids as gamma is, or a function
            ``(states [N, C, *S], context)`` that returns such a tensor, one row per state. None expects no change.
        momentum: How momentum components combine; see ``ttcfast.ops.arm``.
        scale: Whether penalties are absolute or relative; see ``ttcfast.ops.arm``.

    Raises:
        ValueError: The cell volume is not positive, the mask is not bool over the space axes (its size is checked when scoring), or
            ``momentum`` or ``scale`` is unknown, or a weight or budget has a name that is no penalty's or quantity's.

    Source: TTC plan, "Analytical Reward Model (ARM)"; docs/design/decisions.md ("Momentum penalty"), ("Absolute and relative penalties").
    """

    marks_nonfinite = True
    maximum = 0.0  # penalties are non-negative

    def __init__(
        self,
        weights: Weights = None,
        dxdy: float | Tensor | None = None,
        bc_mask: Tensor | None = None,
        *,
        spec: StateSpec | None = None,
        momentum: Momentum = "components",
        scale: Scale = "relative",
        budgets: Mapping[str, float | Tensor | Budget] | None = None,
    ) -> None:
        super().__init__()
        one_of("momentum", momentum, MOMENTA)
        one_of("scale", scale, SCALES)
        self.momentum, self.scale = momentum, scale
        self.weights = ARMWeights() if weights is None else weights
        self.spec: StateSpec = _with(StateSpec.euler2d() if spec is None else spec, dxdy, bc_mask)
        self.ndim = self.spec.ndim
        self.budgets = dict(budgets or {})
        ops.arm_weights(self.spec, weights)  # raises for unknown names
        ops.check_quantities("budgets", self.spec, self.budgets)
        self._specs: dict[torch.device, StateSpec] = {}
        self._budgets: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}  # given, and on the device

    @property
    def timeless(self) -> bool:
        return type(self) is ARMScorer and not any(map(callable, self.budgets.values()))

    def terms(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> ArmScores | FieldScores:
        """Returns all penalties of candidates ``[N, B, C, *S]``, each ``[N, B]``, as ``ttcfast.ops.arm`` does."""
        spec, expected = self._spec_for(state, context), self._expected(state, context)
        return ops.arm(state, candidates, spec, self.weights, momentum=self.momentum, scale=self.scale, expected=expected)

    def _expected(self, state: Tensor, context: ScoreContext | None) -> dict[str, float | Tensor] | None:
        """The budgets of these problems."""
        found: dict[str, float | Tensor] = {}
        for name, budget in self.budgets.items():
            if callable(budget):
                found[name] = budget(state, context)
            elif torch.is_tensor(budget) and budget.ndim and context is not None:
                ids = context.problem_ids
                if not ids.is_cuda and len(ids) and int(ids.max()) >= len(budget):
                    raise ValueError(f"the budget of {name!r} has {len(budget)} entries and problem {int(ids.max())} needs its own")
                found[name] = self._there(name, budget, state.device)[sent(ids, state.device)]
            else:
                found[name] = budget
        return found or None

    def _there(self, name: str, budget: Tensor, device: torch.device) -> Tensor:
        """A budget on the device, where it is copied once."""
        held = self._budgets.get((name, device))
        if held is None or held[0] is not budget:
            held = self._budgets[name, device] = budget, sent(budget, device)
        return held[1]

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self.terms(state, candidates, context).score

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """See ``arm_spread_floor``; None for a subclass that overrides the score."""
        if type(self).score_group is not ARMScorer.score_group:
            return None
        needs_gamma = isinstance(self.spec, EulerSpec) and self.spec.variables == "primitive" and self.scale == "absolute"
        return arm_spread_floor(state, self._spec_for(state, context if needs_gamma else None), self.weights, self.scale)

    def _spec_for(self, state: Tensor, context: ScoreContext | None) -> StateSpec:
        """The spec on the state's device, with the gamma of the context's problems."""
        if state.device not in self._specs:  # the spec's tensors are small and move once
            self._specs[state.device] = self.spec.to(state.device)
        spec = self._specs[state.device]
        return spec if context is None else spec.of_problems(context.problem_ids)


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
    """Returns the negated weighted sum of the penalties, ``[B]``; higher is better.

    Departs from the plan in that every term is per candidate (docs/design/decisions.md ("Penalties per candidate")); for B = 1 both agree.

    Args:
        state_t: Current state ``[C, *S]``, or one per candidate ``[B, C, *S]``.
        cand_tp1: Candidates, ``[B, C, *S]``.
        dxdy: Cell volume, a number or ``[*S]``; None means that of ``spec``.
        bc_mask: Cells with a prescribed value, bool ``[*S]``, ``[C, *S]`` or ``[B, C, *S]``; None means those of ``spec``.
        w: Weight of each penalty.
        spec: Channels, gamma and boundary values; None means density, momentum and energy in the dimensions of ``cand_tp1``.
        momentum: How momentum components combine; see ``ttcfast.ops.arm``.
        scale: Whether penalties are absolute or relative; see ``ttcfast.ops.arm``.

    Returns:
        Scores ``[B]``, differentiable in ``cand_tp1``; -inf for a candidate that is not finite.

    Raises:
        ValueError: Shapes, channels, dtypes or devices do not match.

    Source: TTC plan, "Analytical Reward Model (ARM)".
    """
    spec = _spec(cand_tp1, spec, dxdy)
    if bc_mask is None or bc_mask.ndim == spec.ndim:
        return _scores(state_t, cand_tp1, _with(spec, None, bc_mask), w, momentum, scale).score
    # A StateSpec cannot hold a mask per channel or candidate, so that the boundary term is computed here.
    score = _scores(state_t, cand_tp1, spec.replace(boundary_mask=None), w, momentum, scale).score
    value = 0.0 if spec.boundary_value is None else spec.boundary_value
    violation = _masked_mean((cand_tp1 - value).abs(), bc_mask)
    return torch.where(score.isfinite(), score - w.w_bc * violation.to(score.dtype), score)


def mass_conservation_reward(state_t: Tensor, cand_tp1: Tensor, dxdy: float | Tensor) -> Tensor:
    """Returns the absolute change of total mass, ``[B]``; lower is better. Arguments as in ``arm_score``."""
    return _scores(state_t, cand_tp1, _spec(cand_tp1, None, dxdy)).mass


def momentum_conservation_reward(state_t: Tensor, cand_tp1: Tensor, dxdy: float | Tensor, *, momentum: Momentum = "sum") -> Tensor:
    """Returns the absolute change of total momentum, ``[B]``; lower is better. Components are added first by default, as in the plan."""
    return _scores(state_t, cand_tp1, _spec(cand_tp1, None, dxdy), momentum=momentum).momentum


def energy_conservation_reward(state_t: Tensor, cand_tp1: Tensor, dxdy: float | Tensor) -> Tensor:
    """Returns the absolute change of total energy, ``[B]``; lower is better. Arguments as in ``arm_score``."""
    return _scores(state_t, cand_tp1, _spec(cand_tp1, None, dxdy)).energy


def bc_violation_reward(cand_tp1: Tensor, bc_mask: Tensor | None) -> Tensor:
    """Returns the mean absolute value over masked cells and channels, ``[B]``, 0 if nothing is masked; lower is better.

    Args:
        cand_tp1: Candidates, ``[B, C, *S]``.
        bc_mask: Bool ``[*S]``, ``[C, *S]`` or ``[B, C, *S]``; None masks nothing.

    Raises:
        ValueError: The mask is not bool or does not broadcast to the candidates.
    """
    if bc_mask is None:
        return cand_tp1.new_zeros(cand_tp1.shape[0])
    return _masked_mean(cand_tp1.abs(), bc_mask)


def positivity_reward(cand_tp1: Tensor) -> Tensor:
    """Returns the mean negative part of the density plus that of the pressure, ``[B]``; lower is better.

    Args:
        cand_tp1: Density, momentum and energy, ``[B, C, *S]``; gamma is 1.4.
    """
    return _scores(cand_tp1, cand_tp1, _spec(cand_tp1, None, 1.0)).positivity


def compute_pressure(state: Tensor, gamma: float = 1.4) -> Tensor:
    """Returns the ideal-gas pressure ``(gamma - 1) (E - rho |u|^2 / 2)``, ``[B, *S]``, in the units of the energy.

    Args:
        state: Density, one momentum per dimension and energy, ``[B, C, *S]``. Divides by ``rho + 1e-12``, as the plan does.
        gamma: Ratio of specific heats.
    """
    spec = _spec(state, None, 1.0)
    rho, energy = state[:, spec.density], state[:, spec.energy]
    velocity = state[:, indices(spec.momentum, state.device)] / (rho + 1e-12).unsqueeze(1)
    return (gamma - 1.0) * (energy - 0.5 * rho * (velocity * velocity).sum(1))


def integral(field: Tensor, dxdy: float | Tensor) -> Tensor:
    """Returns the sum of ``field * dxdy`` over the last two axes of ``[..., H, W]``, as the plan does."""
    return (field * dxdy).sum(dim=(-2, -1))


def _spec(cand: Tensor, spec: StateSpec | None, dxdy: float | Tensor | None) -> EulerSpec:
    """The caller's spec or the plan's channels, with this cell volume."""
    if spec is None:
        ndim = cand.ndim - 2
        if not 1 <= ndim <= 3:
            raise ValueError(f"cand_tp1 has shape {tuple(cand.shape)}; expected [B, C, *S] with 1 to 3 space axes")
        spec = EulerSpec(0, tuple(range(1, ndim + 1)), ndim + 1, ndim=ndim)
    if not isinstance(spec, EulerSpec):
        raise ValueError("spec declares other fields than a gas; score them by ARMScorer(spec=spec)")
    made: EulerSpec = _with(spec, dxdy, None)
    return made


def _with(spec: Any, cell_volume: float | Tensor | None, boundary_mask: Tensor | None) -> Any:
    """The spec with those of the given values that are not None."""
    given: dict[str, Any] = {"cell_volume": cell_volume, "boundary_mask": boundary_mask}
    changes = {name: value for name, value in given.items() if value is not None}
    return spec.replace(**changes) if changes else spec


def _scores(
    state: Tensor,
    cand: Tensor,
    spec: EulerSpec,
    w: ARMWeights | None = None,
    momentum: Momentum = "sum",
    scale: Scale = "absolute",
) -> ArmScores:
    """All penalties ``[B]`` of candidates ``[B, C, *S]``; by default with the plan's settings."""
    if not cand.shape[0]:
        raise ValueError(f"cand_tp1 has shape {tuple(cand.shape)}, so B = 0; give at least one candidate")
    states, candidates, pick = grouped(state, cand, spec.ndim)
    return ArmScores(*map(pick, ops.arm(states, candidates, spec, w, momentum=momentum, scale=scale)))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values [B, C, *S]`` where the mask, which broadcasts to them, is True; ``[B]``, 0 if nothing is masked."""
    lead = values.ndim - mask.ndim
    if mask.dtype != torch.bool or lead < 0 or any(m not in (1, v) for m, v in zip(mask.shape, values.shape[lead:])):
        raise ValueError(f"bc_mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool that broadcasts to {tuple(values.shape)}")
    mask = mask.expand(values.shape)
    total = torch.where(mask, values, 0.0).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp_min(1)
