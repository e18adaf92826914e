"""Ways to search, and to refine candidates, as small frozen objects: a short spelling of the plain fields of ``TTCConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ttcfast.checks import whole


class Search(Protocol):
    """A way to keep candidates."""

    def options(self) -> Mapping[str, Any]:
        """Fields of ``TTCConfig`` that say the same."""
        ...


@dataclass(frozen=True)
class Greedy:
    """Keeps the best candidate of every step. This is the default."""

    def options(self) -> Mapping[str, Any]:
        return {"approach": "greedy", "beam_width": 1, "select": "argmax", "lookahead": 0}


@dataclass(frozen=True)
class Beam:
    """Keeps the best ``width`` paths of every problem.

    Args:
        width: Number of beams.
        aggregation: How the scores along a path add up: ``"sum"``, ``"last"``, ``"mean"`` or ``"discounted"``.
        discount: Weight of earlier scores relative to the next, for ``aggregation="discounted"``.
        diverse: Search within the subtree of each first choice, so that beams stay apart. Experimental: no measurement supports it yet.
        lookahead: Deterministic steps by which every candidate is continued before it is ranked. Experimental, as above.
    """

    width: int = 4
    aggregation: Literal["sum", "last", "mean", "discounted"] = "sum"
    discount: float = 0.9
    diverse: bool = False
    lookahead: int = 0

    def options(self) -> Mapping[str, Any]:
        return {
            "approach": "diverse_beam" if self.diverse else "beam",
            "beam_width": self.width,
            "score_aggregation": self.aggregation,
            "discount": self.discount,
            "lookahead": self.lookahead,
        }


@dataclass(frozen=True)
class Particles:
    """Resamples ``width`` particles per problem with weights ``exp(score / temperature)``. Experimental: no measurement supports it yet."""

    width: int = 4
    temperature: float = 1.0

    def options(self) -> Mapping[str, Any]:
        return {"approach": "particle", "beam_width": self.width, "temperature": self.temperature}


@dataclass(frozen=True)
class Mean:
    """Takes the mean of the candidates, or of their last copies where they are refined: with ``symmetry``, an ensemble without training."""

    def options(self) -> Mapping[str, Any]:
        return {"select": "mean"}


@dataclass(frozen=True)
class SoftmaxMean:
    """Takes the mean of the candidates, weighted by ``softmax(score / temperature)``. Experimental: no measurement supports it yet."""

    temperature: float = 1.0

    def options(self) -> Mapping[str, Any]:
        return {"select": "softmax_mean", "temperature": self.temperature}


@dataclass(frozen=True)
class Span:
    """Takes the best point in the span of the candidates by a differentiable reward, within a trust region. Experimental, as above."""

    trust: float | None = 0.5

    def options(self) -> Mapping[str, Any]:
        return {"select": "span", "trust": self.trust}


@dataclass(frozen=True)
class Refine:
    """Moves every candidate along a differentiable reward before it is scored.

    Args:
        steps: Number of moves.
        lengths: Lengths of each move, relative to a full step of ``Scorer.ascent``. Each length makes a copy of the candidate.
        trust: Limit of a move, relative to the size of the candidate's own time step; None for no limit.
    """

    steps: int = 1
    lengths: tuple[float, ...] = (0.5, 1.0)
    trust: float | None = 0.5

    def options(self) -> Mapping[str, Any]:
        return {"refine_steps": self.steps, "refine_lengths": tuple(self.lengths), "trust": self.trust}


_NAMED: Mapping[str, type[Search]] = {
    "greedy": Greedy,
    "beam": Beam,
    "particles": Particles,
    "mean": Mean,
    "softmax_mean": SoftmaxMean,
    "span": Span,
}


def as_search(search: str | Search) -> Search:
    """The search object that a name stands for, with its default settings; an object is returned as it is.

    Raises:
        ValueError: An unknown name, or an object that is no search.
    """
    if isinstance(search, str) and search in _NAMED:
        return _NAMED[search]()
    if not callable(getattr(search, "options", None)) or isinstance(search, (type, Refine)):
        known = ", ".join(map(repr, _NAMED))
        raise ValueError(f"search is {search!r}; give one of {known}, or an object such as ttcfast.Beam(width=4)")
    return search  # type: ignore[return-value]


def as_refinement(refine: int | Refine) -> Refine:
    """A number of moves as a ``Refine`` with its default lengths; 0 means none.

    Raises:
        ValueError: Neither a whole number of at least 0 nor a ``Refine``.
    """
    if isinstance(refine, Refine):
        return refine
    whole("refine", refine, 0)
    return Refine(steps=int(refine))
