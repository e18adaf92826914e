"""What a scorer is: a state and its candidates in, one number per candidate out, higher is better."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttcfast.checks import one_of
from ttcfast.ops.arm import ArmScores, arm
from ttcfast.runtime.lent import lent
from ttcfast.spec import ARMWeights, Momentum, Scale, StateSpec

from .ascent import channel_spread, polyak_move
from .rounding import arm_spread_floor

if TYPE_CHECKING:
    from .composition import ScorerList as ScorerList
    from .oracle import OracleScorer as OracleScorer
    from .prm.scorer import PRMScorer as PRMScorer

__all__ = ["ARMScorer", "OracleScorer", "PRMScorer", "ScoreContext", "Scorer", "ScorerList", "as_scorer"]


@dataclass(frozen=True)
class ScoreContext:
    """Where a scorer is.

    Attributes:
        step: index t of the state being left; the candidates are for t + 1.
        problem_ids: int64 ``[N]``, which problem each state belongs to.
    """

    step: int
    problem_ids: Tensor


Project = Callable[[Tensor, Tensor, "ScoreContext | None"], Tensor]
"""States ``[N, C, *S]``, candidates ``[N, B, C, *S]`` and the context -> the candidates with conservation imposed."""


class Scorer(nn.Module):
    """Base of the scorers; they are callable. A subclass writes ``score_group``, or the sketch's ``score(x_t, cand_tp1)``.

    What a scorer is given belongs to the rollout. A subclass, or a function, that writes into it gets ``ChangedInputError``.

    Attributes:
        ndim: number of space axes of the states, which tells ``[C, H, W]`` from ``[N, C, X]``.
        needs_group: a candidate's score depends on the other candidates, so that a step's candidates must be scored together.
        marks_nonfinite: a candidate that is not finite gets a score that is not finite, so that nobody else need look for it.
        scores_projected: where a rollout imposes conservation, candidates are scored as they are afterwards rather than raw.
        maximum: the largest score there can be, which tells ``ascent`` how far to go; None where it is not known.
        ascent_to_best: a full step of ``ascent`` leads to what the reward takes for the best state, as where it predicts that state.

    Source: seeds/ttc-integration-plan.md section 15.
    """

    ndim: int = 2
    needs_group: bool = False
    marks_nonfinite: bool = False
    scores_projected: bool = False
    maximum: float | None = None
    ascent_to_best: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != "ttcfast":  # ours are known not to write into what they are given
            for name in _LENT.intersection(vars(cls)):
                if isinstance(method := vars(cls)[name], types.FunctionType):
                    setattr(cls, name, _lending(method))

    def score(self, x_t: Tensor, cand_tp1: Tensor, *, context: ScoreContext | None = None) -> Tensor:
        """Scores of candidates, higher is better.

        Args:
            x_t: the state, ``[C, *S]``; or ``[B, C, *S]``, one state per candidate; or ``[N, C, *S]`` for many problems.
            cand_tp1: candidates ``[B, C, *S]``, or ``[N, B, C, *S]`` for many problems.
            context: step and problems, for the scorers that need them.

        Returns:
            ``[B]``, or ``[N, B]`` for many problems.

        Raises:
            ValueError: axes, shapes, dtypes or devices that do not fit together.
        """
        state, candidates, pick = _grouped(x_t, cand_tp1, self.ndim)
        if context is not None and context.problem_ids.numel() == 1 and state.shape[0] > 1:
            context = ScoreContext(context.step, context.problem_ids.reshape(1).expand(state.shape[0]))
        return pick(self.score_group(state, candidates, context))

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """Scores ``[N, B]`` of candidates ``[N, B, C, *S]`` for states ``[N, C, *S]``."""
        raise NotImplementedError(f"{type(self).__name__} has neither score_group(state, candidates, context) nor score(x_t, cand_tp1)")

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """The move of each candidate that would be one full step (length 1) upwards in its score.

        Here from the gradient of ``score_group``: the smallest move, in ``units``, that reaches ``maximum`` to first order. A reward that
        knows better where to go overrides it.

        Args:
            state: the states being left, ``[N, C, *S]``.
            candidates: ``[N, B, C, *S]``.
            context: step and problems, for the scorers that need them.

        Returns:
            ``[N, B, C, *S]``, physical units, without gradient; 0 where a candidate has no finite score.

        Raises:
            ValueError: the score is not differentiable in the candidates, or its maximum is not known.

        Source: DECISIONS, "Added after a prototype" (refinement).
        """
        name = type(self).__name__
        if self.maximum is None:
            raise ValueError(
                f"{name} does not say how large its score can get, so that a step along it has no length; set its maximum (0.0 for a score "
                "that is minus an error), or give it an ascent"
            )
        state = state.detach()
        return polyak_move(lambda c: self.score_group(state, c, context), candidates, self.units(state), self.maximum, name)

    def ascent_and_scores(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> tuple[Tensor, Tensor | None]:
        """``ascent``, and the candidates' scores ``[N, B]`` as ``score_group`` gives them, or None where the ascent does not meet them."""
        return self.ascent(state, candidates, context), None

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """The spread of a group's scores that rounding explains, ``[N]`` for states ``[N, C, *S]``; None where that is not known.

        Scores that lie no further apart say nothing: where the best lies no further from candidate 0's a controller takes candidate 0 (and
        counts it as ``collapsed``), and a z-score of such scores is 0. It must not ask a device for values, and may be asked without the
        candidates.
        """
        return None

    def units(self, state: Tensor) -> Tensor:
        """In what the channels of a difference between states ``[N, C, *S]`` count alike, broadcasts to ``[N, B, C, *S]``."""
        return channel_spread(state).unsqueeze(1)

    def seen(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """The candidates ``[N, B, C, *S]`` as this scorer takes them: projected or as they are."""
        return candidates

    def of_projected(self, project: Project) -> Scorer:
        """What scores this reward in a rollout that imposes conservation: itself, or after ``project`` where it says so."""
        return _OfProjected(self, project) if self.scores_projected else self

    def forward(self, x_t: Tensor, cand_tp1: Tensor, *, context: ScoreContext | None = None) -> Tensor:
        return self.score(x_t, cand_tp1, context=context) if _takes_context(self.score) else self.score(x_t, cand_tp1)


class ARMScorer(Scorer):
    """The analytical reward: minus the weighted conservation, boundary and positivity penalties (``ttcfast.ops.arm``).

    Args:
        weights: of the penalties.
        dxdy: cell volume, a number or ``[*S]``; None keeps the one of ``spec``.
        bc_mask: bool ``[*S]``, cells whose value is prescribed; None keeps the one of ``spec``.
        spec: layout of the states, in physical units; None is the sketch's (rho, rho u, rho v, E, gamma 1.4). A gamma per problem is
            picked by the context's problem ids, or belongs to the states in order where there is no context.
        momentum, scale: as in ``ttcfast.ops.arm``; the defaults are the sketch's (DECISIONS 2, 3).

    Raises:
        ValueError: a cell volume that is not positive, a mask that is not bool over the space axes (its sizes are checked when scoring), an
            unknown ``momentum`` or ``scale``.

    Source: seeds/ttc-integration-plan.md sections 4 and 15.
    """

    marks_nonfinite = True
    maximum = 0.0  # every penalty is at least 0

    def __init__(
        self,
        weights: ARMWeights,
        dxdy: float | Tensor | None,
        bc_mask: Tensor | None = None,
        *,
        spec: StateSpec | None = None,
        momentum: Momentum = "sum",
        scale: Scale = "absolute",
    ) -> None:
        super().__init__()
        one_of("momentum", momentum, ("sum", "components", "norm"))
        one_of("scale", scale, ("absolute", "relative"))
        spec = StateSpec.euler2d() if spec is None else spec
        changes: dict[str, Any] = {} if dxdy is None else {"cell_volume": dxdy}
        changes |= {} if bc_mask is None else {"boundary_mask": bc_mask}
        self.spec = spec.replace(**changes) if changes else spec
        self.weights, self.momentum, self.scale = weights, momentum, scale
        self.ndim = spec.ndim
        self._specs: dict[torch.device, StateSpec] = {}

    def terms(self, state: Tensor, candidates: Tensor, context: ScoreContext | None = None) -> ArmScores:
        """All penalties of candidates ``[N, B, C, *S]``, each ``[N, B]``, as ``ttcfast.ops.arm`` returns them."""
        spec = self._spec_for(state, context)
        return arm(state, candidates, spec, self.weights, momentum=self.momentum, scale=self.scale)

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self.terms(state, candidates, context).score

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """See ``arm_spread_floor``; None for a subclass with another score."""
        if type(self).score_group is not ARMScorer.score_group:
            return None
        by_problem = self.spec.variables == "primitive" and self.scale == "absolute"  # only then gamma matters
        spec = self._spec_for(state, context if by_problem else None)
        return arm_spread_floor(state, spec, self.weights, self.scale)

    def _spec_for(self, state: Tensor, context: ScoreContext | None) -> StateSpec:
        if state.device not in self._specs:
            self._specs[state.device] = _spec_on(self.spec, state.device)
        spec = self._specs[state.device]
        if torch.is_tensor(spec.gamma) and spec.gamma.numel() > 1 and context is not None:
            return spec.replace(gamma=spec.gamma[context.problem_ids.to(state.device)])
        return spec


class _OfProjected(Scorer):
    """Scores what the candidates become when conservation is imposed on them."""

    def __init__(self, scorer: Scorer, project: Project) -> None:
        super().__init__()
        self.scorer, self._project = scorer, project
        self._name = getattr(scorer, "_name", type(scorer).__name__)
        self.ndim, self.maximum, self.ascent_to_best = scorer.ndim, scorer.maximum, scorer.ascent_to_best
        self.needs_group, self.marks_nonfinite = scorer.needs_group, scorer.marks_nonfinite

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self.scorer.score_group(state, self.seen(state, candidates, context), context)

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self.scorer.ascent(state, self.seen(state, candidates, context), context)

    def ascent_and_scores(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> tuple[Tensor, Tensor | None]:
        return self.scorer.ascent_and_scores(state, self.seen(state, candidates, context), context)

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        return self.scorer.spread_floor(state, context)

    def units(self, state: Tensor) -> Tensor:
        return self.scorer.units(state)

    def seen(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self._project(state, candidates, context)


def as_scorer(scorer: Any, *, ndim: int = 2) -> Scorer:
    """Anything that scores, as a ``Scorer``.

    A ``Scorer`` is returned as it is. A callable (or an object with ``score``) that takes ``context`` is called with ``[N, C, *S]`` and
    ``[N, B, C, *S]`` and returns ``[N, B]``. One that takes two arguments is called as in the sketch, once per problem, with the state
    expanded to ``[B, C, *S]`` beside the candidates ``[B, C, *S]``, and returns ``[B]``.

    Raises:
        TypeError: ``scorer`` cannot be called.
        ValueError: a ``Scorer`` for another number of space dimensions.
    """
    if isinstance(scorer, Scorer) and type(scorer).score is Scorer.score:
        if scorer.ndim != ndim:
            raise ValueError(
                f"{type(scorer).__name__} scores states with {scorer.ndim} space axes; the model's have {ndim}; give both one StateSpec"
            )
        return scorer
    function = scorer.score if callable(getattr(scorer, "score", None)) else scorer
    if not callable(function):
        raise TypeError(
            f"scorer is a {type(scorer).__name__}; give a Scorer, or a function score(x_t, cand_tp1) that returns one score per candidate"
        )
    return _FunctionScorer(function, scorer, ndim)


class _FunctionScorer(Scorer):
    """A plain callable as a scorer; see ``as_scorer``."""

    def __init__(self, function: Callable[..., Tensor], owner: Any, ndim: int) -> None:
        super().__init__()
        self.ndim = ndim
        self.needs_group = bool(getattr(owner, "needs_group", False))
        self.scores_projected = bool(getattr(owner, "scores_projected", False))
        self.maximum = getattr(owner, "maximum", None)
        self._function, self._batched = function, _takes_context(function)
        self._name = getattr(owner, "__name__", type(owner).__name__)

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        with lent(f"scorer {self._name}", dict(_given(state, candidates, context))):
            if self._batched:
                return self._checked(self._function(state, candidates, context=context), candidates.shape[:2])
            pairs = zip(state, candidates)
            return torch.stack([self._checked(self._function(x.expand_as(c), c), c.shape[:1]) for x, c in pairs])

    def _checked(self, scores: Any, shape: torch.Size) -> Tensor:
        if not isinstance(scores, Tensor) or scores.shape != shape:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"scorer {self._name} returned {got}; expected one score per candidate, shape {tuple(shape)}")
        return scores


_LENT = {"score_group", "ascent", "ascent_and_scores", "units", "seen"}
"""Methods of a scorer that are handed the tensors of a rollout."""


def _lending(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of a scorer that is not ours, held to leave its arguments as they are."""

    @functools.wraps(method)
    def held(self: Scorer, *args: Any, **options: Any) -> Any:
        with lent(f"scorer {type(self).__name__}", dict(_given(*args, **options))):
            return method(self, *args, **options)

    return held


def _given(*args: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors among the arguments (state, candidates, context) of a scorer's method, by name."""
    for name, value in [*zip(("state", "candidates", "context"), args), *options.items()]:
        if isinstance(value, ScoreContext):
            name, value = "context.problem_ids", value.problem_ids
        if isinstance(value, Tensor):
            yield name, value


def _takes_context(function: Callable[..., Any]) -> bool:
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return False
    return any(p.name == "context" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _grouped(x_t: Tensor, cand: Tensor, ndim: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """State ``[N, C, *S]``, candidates ``[N, B, C, *S]``, and how the scores ``[N, B]`` go back to the caller's layout."""
    if (x_t.dtype, x_t.device) != (cand.dtype, cand.device):
        raise ValueError(f"cand_tp1 is {cand.dtype} on {cand.device} and x_t {x_t.dtype} on {x_t.device}; give both the same with .to()")
    many, one = cand.ndim == ndim + 3, cand.ndim == ndim + 2
    if many and x_t.ndim == ndim + 2 and x_t.shape[1:] == cand.shape[2:] and x_t.shape[0] == cand.shape[0]:
        return x_t, cand, lambda scores: scores
    if one and x_t.ndim == ndim + 1 and x_t.shape == cand.shape[1:]:
        return x_t.unsqueeze(0), cand.unsqueeze(0), lambda scores: scores[0]
    if one and x_t.ndim == ndim + 2 and x_t.shape[1:] == cand.shape[1:] and x_t.shape[0] in (1, cand.shape[0]):
        if x_t.shape[0] == 1 or x_t.stride(0) == 0:  # one state, expanded as the sketch does
            return x_t[:1], cand.unsqueeze(0), lambda scores: scores[0]
        return x_t, cand.unsqueeze(1), lambda scores: scores[:, 0]
    raise ValueError(
        f"x_t has shape {tuple(x_t.shape)} and cand_tp1 {tuple(cand.shape)}; with {ndim} space axes give [C, *S] or [B, C, *S] with "
        "[B, C, *S], or [N, C, *S] with [N, B, C, *S]"
    )


def _spec_on(spec: StateSpec, device: torch.device) -> StateSpec:
    """The spec with its constants on ``device``: they are small and move once."""
    names = ("gamma", "cell_volume", "boundary_mask", "boundary_value")
    moved = {n: v.to(device) for n in names if torch.is_tensor(v := getattr(spec, n)) and v.device != device}
    return spec.replace(**moved) if moved else spec


def __getattr__(name: str) -> Any:
    # the names that the seed and API.md print at this path live in files of their own, which import this one
    if name == "OracleScorer":
        from .oracle import OracleScorer

        return OracleScorer
    if name == "PRMScorer":
        from .prm.scorer import PRMScorer

        return PRMScorer
    if name == "ScorerList":
        from .composition import ScorerList

        return ScorerList
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
