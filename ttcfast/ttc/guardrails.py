"""The checks around a rollout: options that do not exist, states that do not fit, scores that say nothing."""

from __future__ import annotations

import operator
import sys
import warnings
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ttcfast.rewards.scorer import Scorer
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.stochastic_sampling.distinct import distinct_count, projected

_GREEDY: dict[str, tuple[Any, str]] = {  # option -> (the only value that greedy search knows, what the others are)
    "approach": ("greedy", "another search"),
    "beam_width": (1, "a search over several beams"),
    "score_aggregation": ("sum", "the aggregation of a path's scores, of which a greedy search has one"),
    "lookahead": (0, "looking ahead"),
    "temperature": (1.0, "sampling by score"),
    "shard": (None, "a search in several processes"),
}


def check_greedy(cfg: TTCConfig) -> None:
    """Raise ``ValueError`` for an option that greedy search does not have, rather than ignore it."""
    if not isinstance(cfg, TTCConfig):
        raise ValueError(f"cfg is a {type(cfg).__name__}; give a TTCConfig")
    for name, (known, what) in _GREEDY.items():
        value = getattr(cfg, name)
        if value != known and not (name == "temperature" and cfg.select == "softmax_mean"):
            raise ValueError(f"{name} is {value!r}, {what}, which TTCGreedy does not do; use {name}={known!r}")


def check_steps(T: int) -> None:
    """Raise ``ValueError`` unless ``T`` is a whole number of at least 1."""
    if isinstance(T, bool) or not isinstance(T, SupportsIndex) or operator.index(T) < 1:
        raise ValueError(f"T is {T!r}; give a whole number of steps, at least 1")


def check_start(x0: Tensor, ndim: int, history: int, spec: StateSpec | None) -> tuple[Tensor, bool]:
    """``x0`` as ``[N, C, *S]`` (``[N, h, C, *S]`` with history), and whether it was a single problem.

    Raises:
        ValueError: axes, history or channels that do not fit, no problem, or values that are not finite.
    """
    frames = ["h"] if history > 1 else []
    own = len(frames) + 1 + ndim
    if x0.ndim not in (own, own + 1) or not x0.is_floating_point():
        layout = ", ".join([*frames, "C", *["S"] * ndim])
        raise ValueError(
            f"x0 is {x0.dtype} of shape {tuple(x0.shape)}; expected floating point [{layout}] or [N, {layout}] with {ndim} space axes "
            "(StateSpec.ndim, or TTCConfig.ndim for a foreign model)"
        )
    x, single = (x0.detach().unsqueeze(0), True) if x0.ndim == own else (x0.detach(), False)
    if x.shape[0] == 0:
        raise ValueError(f"x0 has shape {tuple(x0.shape)}, so no problem; give at least one")
    if frames and x.shape[1] != history:
        raise ValueError(f"x0 has {x.shape[1]} frames of history (shape {tuple(x0.shape)}); the surrogate sees {history}")
    if spec is not None and x.shape[-ndim - 1] != spec.num_channels:
        raise ValueError(
            f"x0 has {x.shape[-ndim - 1]} channels (shape {tuple(x0.shape)}); the surrogate's StateSpec has {spec.num_channels}"
        )
    finite = finite_states(x)
    if not bool(finite.all()):
        raise ValueError(f"x0 is not finite in problems {(~finite).nonzero().flatten().tolist()[:8]}; a rollout starts from finite states")
    return x, single


def finite_states(x: Tensor, axes: int = 1) -> Tensor:
    """Whether everything behind the first ``axes`` axes is finite."""
    return x.isfinite().flatten(axes).all(axes)


def spread_collapsed(scores: Tensor, least: float, floor: Tensor | None = None) -> Tensor:
    """Whether the usable (finite) scores of each problem ``[N, B]`` differ by at most ``least`` times the largest of their sizes, or by no
    more than ``floor [N]``, what rounding makes of equal ones (``Scorer.spread_floor``).

    False where fewer than two are usable: there is nothing to compare.
    """
    usable = scores.isfinite()
    highest = torch.where(usable, scores, -torch.inf).amax(1)
    lowest = torch.where(usable, scores, torch.inf).amin(1)
    size = torch.where(usable, scores.abs(), 0.0).amax(1)
    limit = least * size if floor is None else (least * size).maximum(floor)
    return (usable.sum(1) > 1) & (highest - lowest <= limit)


def tied_with_first(scores: Tensor, floor: Tensor | None) -> Tensor:
    """Whether the best of the other scores of each problem ``[N, B]`` is within ``floor [N]`` of the first: which of the two is higher is
    rounding, however low a third may be."""
    if floor is None or scores.shape[1] < 2:
        return torch.zeros_like(scores[:, 0], dtype=torch.bool)
    return (scores[:, 0] - scores[:, 1:].amax(1)).abs() <= floor  # not where both are -inf


def finite_without_score(scores: Tensor, candidates: Tensor) -> Tensor:
    """Of the rows ``[m, b]`` without a finite score, how many candidates ``[m, b, C, *S]`` are finite all the same, int64 ``[m]``."""
    lost = ~scores.isfinite().any(1)
    count = torch.zeros_like(lost, dtype=torch.int64)
    if bool(lost.any()):
        count[lost] = finite_states(candidates[lost], 2).sum(1)
    return count


class ScoreWatch:
    """Says once in a rollout that a scorer has no finite score for candidates that are finite."""

    def __init__(self, scorer: Scorer) -> None:
        self._name, self._said = str(getattr(scorer, "_name", type(scorer).__name__)), False

    def say(self, step: int, problem_ids: Tensor, taken: str) -> None:
        """Warn of the first step at which there are such problems, ``problem_ids`` ``[m]``; ``taken`` says what they go on with."""
        if self._said or not len(problem_ids):
            return
        self._said = True
        warnings.warn(
            f"step {step}: scorer {self._name} returned no finite score for problems {problem_ids.tolist()[:8]}, though there are finite "
            f"candidates; {taken} is taken instead. This is said once per rollout, RolloutResult.fallbacks has all such steps; see what "
            "the scorer returns for these states (NaN?)",
            RuntimeWarning,
            stacklevel=_levels_to_caller(),
        )


def _levels_to_caller() -> int:
    """``stacklevel`` for a warning by whoever calls this, of the first line outside ttcfast, to which torch's wrappers count."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("ttcfast", "torch"):
        level, frame = level + 1, frame.f_back
    return level + 1


class DistinctWatch:
    """Counts, chunk by chunk, the candidates of a step that differ from each other by more than rounding.

    Args:
        state: the states that are left, ``[n, C, *S]``.
        width: candidates of each.
    """

    def __init__(self, state: Tensor, width: int) -> None:
        self._state, self.at_once = state, 1
        wide = torch.promote_types(state.dtype, torch.float32)
        self.projections = state.new_zeros((state.shape[0], width, state.shape[1]), dtype=wide)

    def look(self, rows: slice, start: int, candidates: Tensor) -> None:
        """Candidates ``[m, b, C, *S]`` of the states ``rows``, from position ``start`` on."""
        b = candidates.shape[1]
        self.at_once = max(self.at_once, b)
        self.projections[rows, start : start + b] = projected(candidates)

    def count(self) -> Tensor:
        """Distinct candidates of each state, int64 ``[n]``; to be asked when all have been seen."""
        return distinct_count(self.projections, self._state)

    def warn_of_few(self, count: Tensor, model: object) -> None:
        """Warn where more than half of the candidates repeat others."""
        width, mean = self.projections.shape[1], float(count.double().mean())
        if mean < width / 2:
            warnings.warn(
                f"of {width} candidates of {type(model).__name__} only {mean:.3g} are distinct on average, so that a search has little to "
                "choose from; raise the noise (StochasticConfig dropout_p=, latent_sigma=, input_eps=), or lower branching_factor",
                RuntimeWarning,
                stacklevel=_levels_to_caller(),
            )
