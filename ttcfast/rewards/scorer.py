"""Defines what a scorer is: it takes states and candidates and returns one number per candidate, higher is better."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ttcfast.core.context import StepContext
from ttcfast.runtime.lent import lent

from .ascent import channel_spread, polyak_move

ScoreContext: TypeAlias = StepContext
"""Locates a call of a scorer within a rollout."""

Project = Callable[[Tensor, Tensor, ScoreContext | None], Tensor]
"""Maps states ``[N, C, *S]``, candidates ``[N, B, C, *S]`` and a context to the candidates with conservation imposed."""


class Scorer(nn.Module):
    """Base class of scorers. Scorers are callable; a subclass implements ``score_group`` or the plan's ``score(x_t, cand_tp1)``.

    The tensors passed to a scorer belong to the rollout. A subclass or function that modifies them raises ``ChangedInputError``.

    Attributes:
        ndim: Number of space axes of the states, which distinguishes ``[C, H, W]`` from ``[N, C, X]``.
        needs_group: Whether a score depends on the other candidates, so that all candidates of a step must be scored together.
        marks_nonfinite: Whether a non-finite candidate always gets a non-finite score, so that no other check is needed.
        scores_projected: Whether candidates are scored after the conservation projection, in rollouts that apply one.
        maximum: Upper bound of the score, which sets the step length of ``ascent``; None if unknown.
        ascent_to_best: Whether a full step of ``ascent`` reaches the state that the reward considers best.
        timeless: Whether step and time of the context do not matter, so that one record of a search's step serves all
            (``Surrogate(graph=True)``).

    Source: TTC plan, "Minimal Interfaces (Copy-Paste Stubs)"; docs/design/decisions.md ("Scorer context").
    """

    ndim: int = 2
    needs_group: bool = False
    marks_nonfinite: bool = False
    scores_projected: bool = False
    maximum: float | None = None
    ascent_to_best: bool = False

    @property
    def timeless(self) -> bool:
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != "ttcfast":  # our own scorers never modify their inputs
            for name in _LENT.intersection(vars(cls)):
                if isinstance(method := vars(cls)[name], types.FunctionType):
                    setattr(cls, name, _lending(method))

    def score(self, x_t: Tensor, cand_tp1: Tensor, *, context: ScoreContext | None = None) -> Tensor:
        """Scores candidates; higher is better.

        Args:
            x_t: One state ``[C, *S]``, one state per candidate ``[B, C, *S]``, or one state per problem ``[N, C, *S]``.
            cand_tp1: Candidates, ``[B, C, *S]``, or ``[N, B, C, *S]`` for several problems.
            context: Step and problem ids, for scorers that need them.

        Returns:
            Scores ``[B]``, or ``[N, B]`` for several problems.

        Raises:
            ValueError: Axes, shapes, dtypes or devices do not match.
        """
        state, candidates, pick = grouped(x_t, cand_tp1, self.ndim)
        if context is not None and context.problem_ids.numel() == 1 and state.shape[0] > 1:
            context = replace(context, problem_ids=context.problem_ids.reshape(1)).repeated(state.shape[0])
        return pick(self.score_group(state, candidates, context))

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """Returns scores ``[N, B]`` of candidates ``[N, B, C, *S]`` for states ``[N, C, *S]``."""
        raise NotImplementedError(f"{type(self).__name__} has neither score_group(state, candidates, context) nor score(x_t, cand_tp1)")

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """Returns the displacement of each candidate that is one full step (length 1) up its score.

        The default uses the gradient of ``score_group``: the smallest displacement, in ``units``, that reaches ``maximum`` to first order.
        A reward with a better direction overrides it.

        Args:
            state: Current states, ``[N, C, *S]``.
            candidates: Candidates, ``[N, B, C, *S]``.
            context: Step and problem ids, for scorers that need them.

        Returns:
            Displacements ``[N, B, C, *S]`` in physical units, detached; 0 where a candidate has no finite score.

        Raises:
            ValueError: The score is not differentiable in the candidates, or its maximum is unknown.

        Source: docs/design/decisions.md ("Refinement").
        """
        name = type(self).__name__
        if self.maximum is None:
            raise ValueError(
                f"{name} does not say how large its score can get, so that a step along it has no length; set its maximum (0.0 for a "
                "negated error), or implement ascent"
            )
        state = state.detach()
        return polyak_move(lambda c: self.score_group(state, c, context), candidates, self.units(state), self.maximum, name)

    def ascent_and_scores(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> tuple[Tensor, Tensor | None]:
        """Returns ``ascent`` and, if it computes them on the way, the scores ``[N, B]`` of ``score_group``; otherwise None for these."""
        return self.ascent(state, candidates, context), None

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        """Returns the spread of scores within a group that rounding alone can cause, ``[N]`` for states ``[N, C, *S]``; None if unknown.

        Scores no further apart carry no information: a controller takes candidate 0 if the best score is no further from its own (and
        counts the step as ``collapsed``), and z-scores of such a group are 0. Implementations must not synchronise with the device, and
        may be called without candidates.
        """
        return None

    def units(self, state: Tensor) -> Tensor:
        """Returns the scale at which differences in each channel count equally; it broadcasts to ``[N, B, C, *S]``."""
        return channel_spread(state).unsqueeze(1)

    def seen(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """Returns the candidates ``[N, B, C, *S]`` that this scorer evaluates: projected, or unchanged."""
        return candidates

    def of_projected(self, project: Project) -> Scorer:
        """Returns the scorer for rollouts that apply ``project``: one that projects first if ``scores_projected``, else this one."""
        return _Projected(self, project) if self.scores_projected else self

    def forward(self, x_t: Tensor, cand_tp1: Tensor, *, context: ScoreContext | None = None) -> Tensor:
        return self.score(x_t, cand_tp1, context=context) if _takes_context(self.score) else self.score(x_t, cand_tp1)


class _Projected(Scorer):
    """Scores candidates after imposing conservation on them."""

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

    @property
    def timeless(self) -> bool:
        return self.scorer.timeless

    def spread_floor(self, state: Tensor, context: ScoreContext | None) -> Tensor | None:
        return self.scorer.spread_floor(state, context)

    def units(self, state: Tensor) -> Tensor:
        return self.scorer.units(state)

    def seen(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        return self._project(state, candidates, context)


def as_scorer(scorer: Any, *, ndim: int = 2) -> Scorer:
    """Wraps a callable as a ``Scorer``; a ``Scorer`` is returned unchanged.

    A callable (or an object with a ``score`` method) that accepts ``context`` is called with states ``[N, C, *S]`` and candidates
    ``[N, B, C, *S]`` and returns ``[N, B]``. One that accepts two arguments is called once per problem, as in the plan, with the state
    expanded to ``[B, C, *S]`` and candidates ``[B, C, *S]``, and returns ``[B]``.

    Raises:
        TypeError: ``scorer`` is not callable.
        ValueError: A ``Scorer`` was built for another number of space dimensions.
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
    """Adapts a plain callable; see ``as_scorer``."""

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
"""Methods of a scorer that receive the rollout's tensors."""


def _lending(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a method of a user's scorer so that it raises if it modifies its arguments."""

    @functools.wraps(method)
    def held(self: Scorer, *args: Any, **options: Any) -> Any:
        with lent(f"scorer {type(self).__name__}", dict(_given(*args, **options))):
            return method(self, *args, **options)

    return held


def _given(*args: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors among a scorer method's arguments (state, candidates, context), with their names."""
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


def grouped(x_t: Tensor, cand: Tensor, ndim: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Returns states ``[N, C, *S]``, candidates ``[N, B, C, *S]`` and a function that maps scores ``[N, B]`` to the caller's layout.

    Raises:
        ValueError: Axes, shapes, dtypes or devices do not match; see ``Scorer.score``.
    """
    if (x_t.dtype, x_t.device) != (cand.dtype, cand.device):
        raise ValueError(f"cand_tp1 is {cand.dtype} on {cand.device} and x_t {x_t.dtype} on {x_t.device}; give both the same with .to()")
    many, one = cand.ndim == ndim + 3, cand.ndim == ndim + 2
    if many and x_t.ndim == ndim + 2 and x_t.shape[1:] == cand.shape[2:] and x_t.shape[0] == cand.shape[0]:
        return x_t, cand, lambda scores: scores
    if one and x_t.ndim == ndim + 1 and x_t.shape == cand.shape[1:]:
        return x_t.unsqueeze(0), cand.unsqueeze(0), lambda scores: scores[0]
    if one and x_t.ndim == ndim + 2 and x_t.shape[1:] == cand.shape[1:] and x_t.shape[0] in (1, cand.shape[0]):
        if x_t.shape[0] == 1 or x_t.stride(0) == 0:  # one state, expanded as in the plan
            return x_t[:1], cand.unsqueeze(0), lambda scores: scores[0]
        return x_t, cand.unsqueeze(1), lambda scores: scores[:, 0]
    raise ValueError(
        f"x_t has shape {tuple(x_t.shape)} and cand_tp1 {tuple(cand.shape)}; with {ndim} space axes give [C, *S] or [B, C, *S] with "
        "[B, C, *S], or [N, C, *S] with [N, B, C, *S]"
    )
