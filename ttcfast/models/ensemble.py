"""Several models as one: candidates from each in turn, or their mean; classical solvers are models, too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import BaseFM
from ttcfast.physics import SolverError
from ttcfast.spec import StateSpec, StochasticConfig

from .grid_solvers import GridSolver


class SolverStep(BaseFM):
    """A classical solver, or any function from states to those a frame later, as a model without noise.

    It is counted in solver steps, not in model evaluations. A state that the solver cannot take gives NaN, which no search keeps.

    Args:
        step: ``step(x [M, C, *S]) -> [M, C, *S]`` in physical units, or a ``GridSolver`` (``ttcfast.models.grid_solvers.solver_of``), which
            also learns which problems the states are of.
        spec: Layout of the states.
        time_step: Time between a state and the next; None where it is not known, or that of the ``GridSolver``.
    """

    solves = True

    def __init__(self, step: Callable[..., Tensor] | GridSolver, spec: StateSpec, *, time_step: float | None = None) -> None:
        super().__init__()
        self._step = step.step if isinstance(step, GridSolver) else step
        self._located = "problem_ids" in inspect.signature(self._step).parameters
        self.spec, self.history, self.stochastic = spec, 1, StochasticConfig(dropout=False)
        self.time_step = step.time_step if time_step is None and isinstance(step, GridSolver) else time_step

    def forward(self, x_t: Tensor) -> Tensor:
        return self.deterministic(x_t)

    @torch.no_grad()
    def deterministic(self, x: Tensor, *, problem_ids: Tensor | None = None, step: int = 0) -> Tensor:
        """Returns the next states ``[N, C, *S]``."""
        usable = x.isfinite().flatten(1).all(1)
        if bool(usable.all()):
            try:
                return self._solved(x, problem_ids)
            except SolverError:  # of one state: the others are solved without it
                pass
        rows = [self._alone(x[i : i + 1], None if problem_ids is None else problem_ids[i : i + 1]) for i in range(len(x))]
        return torch.cat(rows)

    def candidates(self, x: Tensor, ids: Tensor, *, problem_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Returns the next state of each ``[N, C, *S]``, the same one for every id, ``[N, B, C, *S]``."""
        return self.deterministic(x, problem_ids=problem_ids).unsqueeze(1).expand(-1, ids.shape[-1], *x.shape[1:])

    def _solved(self, x: Tensor, problem_ids: Tensor | None) -> Tensor:
        found = self._step(x, problem_ids=problem_ids) if self._located else self._step(x)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"step returned {got} for states of shape {tuple(x.shape)}; return the next states, alike in shape")
        return found.to(x.dtype)

    def _alone(self, x: Tensor, problem_ids: Tensor | None) -> Tensor:
        try:
            return self._solved(x, problem_ids) if bool(x.isfinite().all()) else torch.full_like(x, torch.nan)
        except SolverError:
            return torch.full_like(x, torch.nan)


class _Several(BaseFM):
    """What ensembles and blends share: members of one layout."""

    keyed = True

    def __init__(self, members: Sequence[BaseFM]) -> None:
        super().__init__()
        if len(members) < 2:
            raise ValueError(f"members holds {len(members)}; give two or more models")
        for member in members:
            if not callable(getattr(member, "candidates", None)) or not isinstance(getattr(member, "spec", None), StateSpec):
                raise TypeError(f"members holds a {type(member).__name__}; give Surrogates, and solvers as SolverStep(step, spec)")
        self.members = nn.ModuleList(members)
        first = self._members()[0]
        self.spec, self.history, self.stochastic = first.spec, max(m.history for m in self._members()), first.stochastic
        for member in self._members():
            if member.spec.num_channels != self.spec.num_channels or member.spec.ndim != self.spec.ndim:
                raise ValueError(
                    f"members have states of {self.spec.num_channels} and {member.spec.num_channels} channels; give one layout"
                )
        steps = sorted({m.time_step for m in self._members() if m.time_step is not None})
        if steps and steps[-1] - steps[0] > 1e-3 * steps[-1]:
            raise ValueError(f"members step by {steps[0]:g} and {steps[-1]:g}; give models of one time step")
        self.time_step = steps[0] if steps else None

    def forward(self, x_t: Tensor) -> Tensor:
        return self.deterministic(x_t)

    def deterministic(self, x: Tensor, *, problem_ids: Tensor | None = None, step: int = 0) -> Tensor:
        raise NotImplementedError

    def _members(self) -> list[Any]:
        return list(self.members)

    def _seen(self, member: Any, x: Tensor) -> Tensor:
        """The frames of ``x`` that a member sees."""
        if self.history == 1:
            return x
        return x[:, -1] if member.history == 1 else x[:, -member.history :]

    def _still(self, member: Any, x: Tensor, problem_ids: Tensor | None, step: int) -> Tensor:
        found: Tensor = member.deterministic(self._seen(member, x), problem_ids=problem_ids, step=step)
        return found

    def _drawn(self, member: Any, x: Tensor, ids: Tensor, problem_ids: Tensor | None, options: dict[str, Any]) -> Tensor:
        noise = options.get("stochastic") or member.stochastic
        if solves(member) or not StochasticConfig.of(noise).active:
            found = self._still(member, x, problem_ids, options["step"])
            return found.unsqueeze(1).expand(-1, ids.shape[-1], *found.shape[1:])
        drawn: Tensor = member.candidates(self._seen(member, x), ids, problem_ids=problem_ids, **options)
        return drawn


class Ensemble(_Several):
    """Candidates of several models in turn: checkpoints, heads, classical solvers.

    Candidate i is candidate ``i // m`` of member ``i % m``; the deterministic step is the first member's. With ``select="mean"`` and B = m
    it is the plain ensemble; a reward, or ``select="span"``, chooses among the members or blends them step by step.

    Args:
        members: Surrogates of one layout and time step, and solvers as ``SolverStep``. A member without noise gives its deterministic
            step, whichever of its candidates is asked for.

    Raises:
        TypeError, ValueError: A member that is no such model, or members of several layouts or time steps.
    """

    @torch.no_grad()
    def deterministic(self, x: Tensor, *, problem_ids: Tensor | None = None, step: int = 0) -> Tensor:
        """Returns the first member's step without noise, ``[N, C, *S]``."""
        return self._still(self.members[0], x, problem_ids, step)

    @torch.no_grad()
    def candidates(self, x: Tensor, ids: Tensor, *, problem_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Returns ``[N, B, C, *S]`` for ids ``[B]`` or ``[N, B]``; see ``Surrogate.candidates``."""
        latest, m = (x[:, -1] if self.history > 1 else x), len(self.members)
        each = ids.expand(len(x), -1)
        out = latest.new_empty(*each.shape, *latest.shape[1:])
        problems = torch.arange(len(x), device=x.device) if problem_ids is None else problem_ids
        for number, member in enumerate(self.members):
            own = each % m == number
            rows = own.any(1).nonzero().flatten()
            if ids.ndim == 1 and len(rows):  # one call for all states
                at = own[0].nonzero().flatten()
                out[:, at] = self._drawn(member, x, ids[at] // m, problem_ids, options)
                continue
            for row in rows.tolist():
                at, one = own[row].nonzero().flatten(), slice(row, row + 1)
                out[row, at] = self._drawn(member, x[one], each[row, at] // m, problems[one], options)[0]
        return out

    def own_ids(self, ids: Tensor) -> Tensor:
        """Returns the ids under which members draw the candidates ``ids``; a solver's candidates are all its first."""
        m = len(self.members)
        still = torch.tensor([solves(member) for member in self.members])
        return torch.where(still[ids.cpu() % m].to(ids.device), 0, ids // m)

    def cost(self, ids: Tensor) -> tuple[int, int]:
        """Returns the model evaluations and solver steps that candidates ``ids [N, B]`` take."""
        of = ids.cpu() % len(self.members)
        solvers = [number for number, member in enumerate(self.members) if solves(member)]
        solved = torch.stack([of == number for number in solvers]) if solvers else torch.zeros(0, *of.shape, dtype=torch.bool)
        return int((~solved.any(0)).sum() if solvers else of.numel()), int(solved.any(2).sum())


class Blend(_Several):
    """The weighted mean of several models, candidate by candidate: a surrogate's and a classical solver's, say.

    Members whose candidate is not finite, such as a solver's that could not take the state, are left out of its mean.

    Args:
        members: As for ``Ensemble``.
        weights: One per member; None weighs all alike. They are divided by their sum.

    Raises:
        TypeError, ValueError: As ``Ensemble``, or weights that do not match or are not positive.
    """

    def __init__(self, members: Sequence[BaseFM], weights: Sequence[float] | None = None) -> None:
        super().__init__(members)
        given = [1.0] * len(members) if weights is None else [float(w) for w in weights]
        if len(given) != len(members) or not all(0 < w < float("inf") for w in given):
            raise ValueError(f"weights is {weights} for {len(members)} members; give one positive number for each")
        self.weights = [w / sum(given) for w in given]

    @torch.no_grad()
    def deterministic(self, x: Tensor, *, problem_ids: Tensor | None = None, step: int = 0) -> Tensor:
        """Returns the mean of the members' steps without noise, ``[N, C, *S]``."""
        return self._mean([self._still(member, x, problem_ids, step) for member in self.members], 1)

    @torch.no_grad()
    def candidates(self, x: Tensor, ids: Tensor, *, problem_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Returns ``[N, B, C, *S]`` for ids ``[B]`` or ``[N, B]``; see ``Surrogate.candidates``."""
        return self._mean([self._drawn(member, x, ids, problem_ids, options) for member in self.members], 2)

    def cost(self, ids: Tensor) -> tuple[int, int]:
        """Returns the model evaluations and solver steps that candidates ``ids [N, B]`` take."""
        solvers = sum(solves(member) for member in self.members)
        return ids.numel() * (len(self.members) - solvers), len(ids) * solvers

    def _mean(self, found: Sequence[Tensor], lead: int) -> Tensor:
        total, weight = torch.zeros_like(found[0]), found[0].new_zeros(found[0].shape[:lead])
        for share, member in zip(self.weights, found):
            usable = member.isfinite().flatten(lead).all(lead)
            wide = usable.reshape(*usable.shape, *[1] * (member.ndim - lead))
            total = total + torch.where(wide, share * member, 0.0)
            weight = weight + share * usable
        return total / weight.reshape(*weight.shape, *[1] * (total.ndim - lead))  # NaN where no member is usable


def solves(member: Any) -> bool:
    """Whether a model is a classical solver, whose steps are counted apart."""
    return bool(getattr(member, "solves", False))
