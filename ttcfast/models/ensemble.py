"""Several models as one: candidates from each in turn, or their mean; classical solvers are models, too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import BaseFM, Surrogate
from ttcfast.physics import SolverError
from ttcfast.spec import StateSpec, StochasticConfig
from ttcfast.stochastic_sampling.distinct import DeterministicModelError
from ttcfast.stochastic_sampling.sites import noise_sites
from ttcfast.transfer import sent

from .grid_solvers import GridSolver, StepSolver, takes_problems

Noise = StochasticConfig | Mapping[str, Any] | None


class SolverStep(BaseFM):
    """A classical solver, or any function from states to those a frame later, as a model without noise.

    It is counted in solver steps, not in model evaluations. A state that the solver cannot take gives NaN, which no search keeps.

    Args:
        step: ``step(x [M, C, *S]) -> [M, C, *S]`` in physical units, or a ``GridSolver`` (``ttcfast.models.grid_solvers.solver_of``). One
            that takes ``problem_ids`` learns which problems the states are of.
        spec: Layout of the states.
        time_step: Time between a state and the next; None where it is not known, or that of the ``GridSolver``.

    Raises:
        TypeError: ``step`` cannot be called, or ``spec`` is no layout.
    """

    solves = keyed = True
    history = 1

    def __init__(self, step: Callable[..., Tensor] | GridSolver, spec: StateSpec, *, time_step: float | None = None) -> None:
        super().__init__()
        if not callable(step) and not isinstance(step, GridSolver):
            raise TypeError(f"step is a {type(step).__name__}; give a function from states [M, C, *S] to the next ones, or a GridSolver")
        if not isinstance(spec, StateSpec):
            raise TypeError(f"spec is a {type(spec).__name__}; give the layout of the states, a StateSpec")
        self._step: Callable[..., Tensor] = step.step if isinstance(step, GridSolver) else step
        self._located = takes_problems(self._step)
        self.spec, self.stochastic, self.time_step = spec, StochasticConfig(dropout=False), time_step
        if time_step is None and isinstance(step, GridSolver) and not isinstance(step, StepSolver):
            self.time_step = step.time_step

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

    def own_ids(self, ids: Tensor) -> Tensor:
        """Returns the ids under which candidates are drawn: all are the first."""
        return torch.zeros_like(ids)

    def cost(self, ids: Tensor) -> tuple[int, int]:
        """Returns the model evaluations and solver steps that candidates ``ids [N, B]`` take: a step for each state."""
        return 0, len(ids)

    def _solved(self, x: Tensor, problem_ids: Tensor | None) -> Tensor:
        found = self._step(x, problem_ids=problem_ids) if self._located else self._step(x)
        if not isinstance(found, Tensor) or found.shape != x.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"step returned {got} for states of shape {tuple(x.shape)}; return the next states, alike in shape")
        return self.spec.carried(found.to(x), x, channel_axis=1)

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
        if isinstance(members, nn.Module) or len(members) < 2:
            got = f"is a {type(members).__name__}" if isinstance(members, nn.Module) else f"holds {len(members)}"
            raise ValueError(f"members {got}; give a list of two or more models")
        for member in members:
            if not isinstance(member, (Surrogate, SolverStep, _Several)):
                raise TypeError(
                    f"members holds a {type(member).__name__}; give networks as Surrogate(model, spec), solvers as SolverStep(step, spec)"
                )
        self.members = nn.ModuleList(members)
        own = self._members()
        self.spec, self.history = own[0].spec, max(member.history for member in own)
        self.stochastic = next((member.stochastic for member in own if not solves(member)), own[0].stochastic)
        for member in own:
            if (member.spec.ndim, member.spec.meaning) != (self.spec.ndim, self.spec.meaning):
                one, other = (f"{', '.join(spec.names)} in {spec.ndim} dimensions" for spec in (self.spec, member.spec))
                raise ValueError(f"members have states of {one} and of {other}; give models of one layout, with the channels in one order")
        steps = sorted({member.time_step for member in own if member.time_step is not None})
        if steps and steps[-1] - steps[0] > 1e-3 * steps[-1]:
            raise ValueError(f"members step by {steps[0]:g} and {steps[-1]:g}; give models of one time step")
        self.time_step = steps[0] if steps else None

    @property
    def compiled(self) -> bool:
        """Whether a member is compiled, so that a new number of problems or candidates costs a compilation."""
        return any(_compiled(member) for member in self.members)

    @property
    def surrogates(self) -> list[Surrogate]:
        """The surrogates among the members, and among theirs."""
        own = [[member] if isinstance(member, Surrogate) else getattr(member, "surrogates", []) for member in self.members]
        return [surrogate for part in own for surrogate in part]

    def dropout_rates(self, stochastic: Noise = None) -> list[float]:
        """Returns the positive dropout rates that act in ``candidates``, of all members."""
        return [rate for surrogate in self.surrogates for rate in surrogate.dropout_rates(stochastic)]

    def with_spec(self, spec: StateSpec) -> _Several:
        """Returns the same models for a layout with the same channels: another domain, boundary or gamma."""
        other = copy.copy(self)
        other._modules = {"members": nn.ModuleList([with_spec(member, spec) for member in self.members])}
        other.spec = spec
        return other

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

    def _drawn(self, member: Any, x: Tensor, ids: Tensor, problem_ids: Tensor | None, options: Mapping[str, Any]) -> Tensor:
        """Candidates ``[N, B, C, *S]`` of a member; its deterministic step for every id if it has no noise."""
        if _draws(member, member.stochastic if options["stochastic"] is None else options["stochastic"]):
            try:
                drawn: Tensor = member.candidates(self._seen(member, x), ids, problem_ids=problem_ids, **options)
                return drawn
            except DeterministicModelError:  # the noise that is asked for finds no place in this member; the search looks at all of them
                pass
        found = self._still(member, x, problem_ids, options["step"])
        return found.unsqueeze(1).expand(-1, ids.shape[-1], *found.shape[1:])


class Ensemble(_Several):
    """Candidates of several models in turn: checkpoints, heads, classical solvers.

    Candidate i is candidate ``i // m`` of member ``i % m``; the deterministic step is the first member's. With ``select="mean"`` and B = m
    it is the plain ensemble; a reward, or ``select="span"``, chooses among the members or blends them step by step.

    Args:
        members: Surrogates of one layout and time step, solvers as ``SolverStep``, and blends of these. A member without noise gives its
            deterministic step, whichever of its candidates is asked for.

    Raises:
        TypeError, ValueError: A member that is no such model, or members of several layouts or time steps.
    """

    @torch.no_grad()
    def deterministic(self, x: Tensor, *, problem_ids: Tensor | None = None, step: int = 0) -> Tensor:
        """Returns the first member's step without noise, ``[N, C, *S]``."""
        return self._still(self.members[0], x, problem_ids, step)

    @torch.no_grad()
    def candidates(
        self, x: Tensor, ids: Tensor, *, problem_ids: Tensor | None = None, seed: int, step: int, stochastic: Noise = None
    ) -> Tensor:
        """Returns ``[N, B, C, *S]`` for ids ``[B]`` or ``[N, B]``; see ``Surrogate.candidates``."""
        options = {"seed": seed, "step": step, "stochastic": stochastic}
        latest, m, each = (x[:, -1] if self.history > 1 else x), len(self.members), ids.cpu().expand(len(x), -1)
        out = latest.new_empty(*each.shape, *latest.shape[1:])
        problems = torch.arange(len(x)) if problem_ids is None else problem_ids.cpu()
        for number, member in enumerate(self.members):
            own = each % m == number
            for rows, count in self._calls(member, own):
                place = (~own[rows]).long().argsort(dim=1, stable=True)[:, :count]  # its candidates first
                wanted, given = own[rows].gather(1, place), each[rows].gather(1, place) // m
                spare = int(each.max()) // m + 1 + torch.arange(count)  # thrown away
                part = x if len(rows) == len(x) else x[sent(rows, x.device)]
                drawn = self._drawn(member, part, torch.where(wanted, given, spare), problems[rows], options)
                row, column = wanted.nonzero(as_tuple=True)
                to, at, of, its = (sent(index, x.device) for index in (rows[row], place[row, column], row, column))
                out[to, at] = drawn[of, its]
        return out

    def _calls(self, member: Any, own: Tensor) -> Iterator[tuple[Tensor, int]]:
        """The states and the number of candidates of each call of a member that is to draw the candidates ``own [N, B]``, on the host."""
        counts = own.sum(1)
        if _compiled(member) and bool(own.any()):  # one shape, whichever ids fall to it
            yield torch.arange(len(own)), -(-own.shape[1] // len(self.members))
            return
        for count in counts.unique().tolist():
            if count:
                yield (counts == count).nonzero().flatten(), count

    def own_ids(self, ids: Tensor) -> Tensor:
        """Returns the ids under which members draw the candidates ``ids``; a solver's candidates are all its first."""
        m, found = len(self.members), torch.zeros_like(ids)
        for number, member in enumerate(self.members):
            drawn = member.own_ids(ids // m) if isinstance(member, (SolverStep, Ensemble)) else ids // m
            found = torch.where(ids % m == number, drawn, found)
        return found

    def cost(self, ids: Tensor) -> tuple[int, int]:
        """Returns the model evaluations and solver steps that candidates ``ids [N, B]`` take."""
        m, evaluations, steps = len(self.members), 0, 0
        groups, counts = ids.cpu().unique(dim=0, return_counts=True)  # most states have the same ids
        for group, count in zip(groups, counts.tolist()):
            for number, member in enumerate(self.members):
                own = group[group % m == number] // m
                found = _cost(member, own.unsqueeze(0)) if len(own) else (0, 0)
                evaluations, steps = evaluations + count * found[0], steps + count * found[1]
        return evaluations, steps


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
    def candidates(
        self, x: Tensor, ids: Tensor, *, problem_ids: Tensor | None = None, seed: int, step: int, stochastic: Noise = None
    ) -> Tensor:
        """Returns ``[N, B, C, *S]`` for ids ``[B]`` or ``[N, B]``; see ``Surrogate.candidates``."""
        options = {"seed": seed, "step": step, "stochastic": stochastic}
        return self._mean([self._drawn(member, x, ids, problem_ids, options) for member in self.members], 2)

    def cost(self, ids: Tensor) -> tuple[int, int]:
        """Returns the model evaluations and solver steps that candidates ``ids [N, B]`` take."""
        evaluations, steps = zip(*(_cost(member, ids) for member in self.members))
        return sum(evaluations), sum(steps)

    def _mean(self, found: Sequence[Tensor], lead: int) -> Tensor:
        total, weight = torch.zeros_like(found[0]), found[0].new_zeros(found[0].shape[:lead])
        for share, member in zip(self.weights, found):
            usable = member.isfinite().flatten(lead).all(lead)
            wide = usable.reshape(*usable.shape, *[1] * (member.ndim - lead))
            total = total + torch.where(wide, share * member, 0.0)
            weight = weight + share * usable.to(weight.dtype)
        return total / weight.reshape(*weight.shape, *[1] * (total.ndim - lead))  # NaN where no member is usable


def with_spec(model: Any, spec: StateSpec) -> Any:
    """Return the same model for a layout with the same channels; the model itself stays as it is."""
    if isinstance(model, _Several):
        return model.with_spec(spec)
    other = copy.copy(model)
    other.spec = spec
    return other


def _cost(member: Any, ids: Tensor) -> tuple[int, int]:
    """Model evaluations and solver steps of a member's candidates ``[N, B]``."""
    found: tuple[int, int] = (ids.numel(), 0) if isinstance(member, Surrogate) else member.cost(ids)
    return found


def _draws(member: Any, noise: Noise) -> bool:
    """Whether candidates of a member may differ."""
    config = StochasticConfig.of(noise)
    return isinstance(member, _Several) or (not solves(member) and (config.active or bool(noise_sites(member.model, config))))


def _compiled(member: Any) -> bool:
    return bool(getattr(member, "compiled", False))


def solves(member: Any) -> bool:
    """Whether a model is a classical solver, whose steps are counted apart."""
    return bool(getattr(member, "solves", False))
