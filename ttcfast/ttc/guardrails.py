"""Guards a rollout against unusable states, identical candidates and scores that carry no information."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable
from typing import SupportsIndex

import torch
from torch import Tensor

from ttcfast.rewards.scorer import Scorer
from ttcfast.spec import FieldSpec, StateSpec
from ttcfast.stochastic_sampling.distinct import distinct_count, projected, require_stochastic

from .models import Source


def check_start(x0: Tensor, T: int, problem_ids: Tensor | None, source: Source) -> tuple[Tensor, bool, Tensor]:
    """Check the start of a rollout.

    Returns:
        ``x0`` as ``[N, C, *S]`` (``[N, h, C, *S]`` with history), whether it is a single problem, and the problem ids ``[N]``.

    Raises:
        ValueError: ``T`` is no whole number of at least 1, the axes, frames or channels do not fit the model, there is no problem, values
            are not finite, or there is not one id for each problem.
    """
    if isinstance(T, bool) or not isinstance(T, SupportsIndex) or operator.index(T) < 1:
        raise ValueError(f"T is {T!r}; give a whole number of steps, at least 1")
    ndim, spec = source.ndim, source.spec
    frames = ["h"] if source.history > 1 else []
    own = len(frames) + 1 + ndim
    if x0.ndim not in (own, own + 1) or not x0.is_floating_point():
        layout = ", ".join([*frames, "C", *["S"] * ndim])
        raise ValueError(
            f"x0 is {x0.dtype} of shape {tuple(x0.shape)}; expected floating point [{layout}] or [N, {layout}] with {ndim} space axes "
            "(StateSpec.ndim, or TTCConfig.ndim for a foreign model)"
        )
    x, single = (x0.detach().unsqueeze(0), True) if x0.ndim == own else (x0.detach(), False)
    n = len(x)
    if n == 0:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, so no problem; give at least one")
    if frames and x.shape[1] != source.history:
        raise ValueError(f"x0 has {x.shape[1]} frames of history (shape {tuple(x0.shape)}); the surrogate sees {source.history}")
    if spec is not None and x.shape[-ndim - 1] != spec.num_channels:
        raise ValueError(
            f"x0 has {x.shape[-ndim - 1]} channels (shape {tuple(x0.shape)}); the surrogate's StateSpec has {spec.num_channels}"
        )
    _require_within_bounds(x, spec)
    finite = finite_states(x)
    if not bool(finite.all()):
        raise ValueError(f"x0 is not finite in problems {(~finite).nonzero().flatten().tolist()[:8]}; a rollout starts from finite states")
    ids = torch.arange(n, device=x.device) if problem_ids is None else torch.as_tensor(problem_ids, device=x.device)
    if ids.shape != (n,) or ids.is_floating_point():
        raise ValueError(f"problem_ids are {ids.dtype} {tuple(ids.shape)}; give one integer for each of the {n} problems")
    return x, single, ids


def _require_within_bounds(x: Tensor, spec: StateSpec | None) -> None:
    """Raise ``ValueError`` if the declared bounds of a channel exclude every value of ``x [N, (h,) C, *S]``."""
    if not isinstance(spec, FieldSpec):
        return
    for channel, (low, high) in spec.bounded_channels.items():
        least, most = x.select(-spec.ndim - 1, channel).aminmax()
        if (low is not None and bool(most < low)) or (high is not None and bool(least > high)):
            raise ValueError(
                f"channel {spec.names[channel]!r} of x0 goes from {float(least):g} to {float(most):g}, outside its bounds ({low}, {high}); "
                "declare the bounds in the units of the states"
            )


def finite_states(x: Tensor, axes: int = 1) -> Tensor:
    """Whether all values beyond the first ``axes`` axes are finite."""
    return x.isfinite().flatten(axes).all(axes)


class Spread:
    """How far the scores of each row's candidates lie apart.

    Attributes:
        floor: float64 ``[M]``, spread that rounding explains (``Scorer.spread_floor``); -inf where it is not known.
        highest, lowest, size: float64 ``[M]``, largest and smallest usable score, and largest absolute value.
        count: int64 ``[M]``, number of usable scores.
        opening, rest: float64 ``[M]``, value by which candidate 0 is ranked, and the best such value of the others.
        first: float64 ``[M]``, candidate 0's score of this step alone.
    """

    def __init__(self, floor: Tensor) -> None:
        self.floor = floor
        self.highest = torch.full_like(floor, -torch.inf)
        self.lowest, self.size = -self.highest, torch.zeros_like(floor)
        self.rest, self.opening, self.first = (self.highest.clone() for _ in range(3))
        self.count = torch.zeros_like(floor, dtype=torch.int64)

    @classmethod
    def of(cls, scores: Tensor, floor: Tensor | None = None) -> Spread:
        """The spread of complete groups, float64 ``[N, B]``."""
        spread = cls(torch.full_like(scores[:, 0], -torch.inf) if floor is None else floor.to(scores.dtype))
        spread.add(slice(None), 0, scores, scores[:, 0])
        return spread

    def add(self, rows: slice, start: int, values: Tensor, first: Tensor) -> None:
        """Add candidates from position ``start``, ranked by ``values [m, b]``; ``first [m]`` is the score of the first of them."""
        usable = values.isfinite()
        self.highest[rows] = self.highest[rows].maximum(torch.where(usable, values, -torch.inf).amax(1))
        self.lowest[rows] = self.lowest[rows].minimum(torch.where(usable, values, torch.inf).amin(1))
        self.size[rows] = self.size[rows].maximum(torch.where(usable, values.abs(), 0.0).amax(1))
        self.count[rows] += usable.sum(1)
        if start == 0:
            self.first[rows], self.opening[rows] = torch.where(usable[:, 0], first, -torch.inf), values[:, 0]
        others = values if start else values[:, 1:]
        if others.shape[1]:
            self.rest[rows] = self.rest[rows].maximum(others.amax(1))

    def flat(self, least: float) -> Tensor:
        """Whether the usable scores differ by at most ``least`` times the largest of their sizes, or by rounding alone, bool ``[M]``.

        False where fewer than two scores are usable: there is nothing to compare.
        """
        return (self.count > 1) & (self.highest - self.lowest <= (least * self.size).maximum(self.floor))

    def collapsed(self, least: float) -> Tensor:
        """Whether the scores are flat and candidate 0 can be taken in place of the best, bool ``[M]``."""
        return self.flat(least) & self.first.isfinite()

    def tied(self) -> Tensor:
        """Whether rounding alone separates the best of the other candidates from candidate 0, bool ``[M]``."""
        return (self.opening - self.rest).abs() <= self.floor  # not where both are -inf

    def like_first(self, rows: Tensor, values: Tensor) -> Tensor:
        """Whether rounding alone separates a candidate ranked by ``values [R]`` from a candidate 0 that no other betters, bool ``[R]``."""
        return self.tied()[rows] & ((values - self.opening[rows]).abs() <= self.floor[rows])

    def replace(self, rows: Tensor, other: Spread, theirs: Tensor) -> None:
        """Take over the rows ``theirs`` of ``other``."""
        for name, value in vars(other).items():
            getattr(self, name)[rows] = value[theirs]


def warn_of_dead(step: int, problem_ids: list[int], resamples: int) -> None:
    """Warn of problems that have no finite next state."""
    warnings.warn(
        f"step {step}: no finite next state for problems {problem_ids[:8]}, not even after {resamples} resamplings and the fallback; they "
        "are NaN from here on",
        RuntimeWarning,
        stacklevel=_levels_to_caller(),
    )


class ScoreWatch:
    """Warns once in a rollout of a scorer that has no finite score for finite candidates."""

    def __init__(self, scorer: Scorer) -> None:
        self._name, self._said = str(getattr(scorer, "_name", type(scorer).__name__)), False

    def say(self, step: int, problem_ids: list[int], taken: str) -> None:
        """Warn at the first step with such problems, an id for each beam; ``taken`` names the state that they continue from."""
        if self._said or not problem_ids:
            return
        self._said, named = True, list(dict.fromkeys(problem_ids))[:8]
        warnings.warn(
            f"step {step}: scorer {self._name} returned no finite score for problems {named}, though there are finite "
            f"candidates; {taken} is taken instead. This is said once per rollout, RolloutResult.fallbacks has all such steps; see what "
            "the scorer returns for these states (NaN?)",
            RuntimeWarning,
            stacklevel=_levels_to_caller(),
        )


def _levels_to_caller() -> int:
    """Return the ``stacklevel`` that points the caller's warning at the first line outside ttcfast and torch."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("ttcfast", "torch"):
        level, frame = level + 1, frame.f_back
    return level + 1


class DistinctWatch:
    """Counts, chunk by chunk, the candidates of a step that differ by more than rounding.

    Args:
        state: States being left, ``[n, C, *S]``.
        width: Number of candidates of each.
    """

    def __init__(self, state: Tensor, width: int) -> None:
        self._state, self.at_once = state, 1
        wide = torch.promote_types(state.dtype, torch.float32)
        self.projections = state.new_zeros((state.shape[0], width, state.shape[1]), dtype=wide)

    def look(self, rows: slice, start: int, candidates: Tensor) -> Tensor:
        """Look at candidates ``[m, b, C, *S]`` of the states ``rows`` from position ``start``; whether each is finite, bool ``[m, b]``."""
        b = candidates.shape[1]
        self.at_once = max(self.at_once, b)
        self.projections[rows, start : start + b] = found = projected(candidates)
        return found.isfinite().all(2)

    def count(self) -> Tensor:
        """Number of distinct candidates of each state, int64 ``[n]``, once all have been seen."""
        return distinct_count(self.projections, self._state)

    def require_stochastic(self, count: Tensor, draw: Callable[[Tensor], Tensor], after: int, model: object) -> int:
        """Warn where more than half of a first step's candidates repeat others, and raise where the model gives no others.

        Args:
            count: As returned by ``count``.
            draw: Draws candidates ``[1, B, C, *S]`` of the first problem by ids ``[B]``, which begin at ``after``.
            model: Model to name in the message.

        Returns:
            The number of candidates drawn to find that out, 0 where some differ.

        Raises:
            DeterministicModelError: All candidates of all problems are the same, and so are those drawn here.
        """
        if not bool((count > 1).any()):
            return require_stochastic(draw, after, self.at_once, model)
        width, mean = self.projections.shape[1], float(count.double().mean())
        if mean < width / 2:
            warnings.warn(
                f"of {width} candidates of {type(model).__name__} only {mean:.3g} are distinct on average, so that a search has little to "
                "choose from; raise the noise (StochasticConfig dropout_p=, latent_sigma=, input_eps=), or lower branching_factor",
                RuntimeWarning,
                stacklevel=_levels_to_caller(),
            )
        return 0
