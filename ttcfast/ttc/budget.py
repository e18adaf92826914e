"""How much a rollout may spend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ttcfast.checks import one_of, whole


@dataclass(frozen=True)
class Budget:
    """A limit of a search, checked before every step.

    Args:
        evaluations: model evaluations of all problems together: a search step, or a group drawn again, is left out if it, the fallback of
            its beams where that costs any (``include_deterministic=False``), and the deterministic rest behind it would not fit. Exceeded
            only where all candidates of the first step are alike, by the 16 candidates of its first problem (or as many as a chunk draws of
            one, if that is more) that are then looked at before the model is called deterministic.
        seconds: no search step begins later than this after the rollout has. The step under way and the deterministic rest come on top.
        then: ``"deterministic"``: each problem's best beam is rolled on by the deterministic step, one evaluation a step; ``"end"``: the
            rollout ends, and its trajectory with it.

    Raises:
        ValueError: neither limit, one that is not positive, an unknown ``then``.
    """

    evaluations: int | None = None
    seconds: float | None = None
    then: Literal["deterministic", "end"] = "deterministic"

    def __post_init__(self) -> None:
        if self.evaluations is None and self.seconds is None:
            raise ValueError("evaluations and seconds are both None; give one of them, or no budget")
        if self.evaluations is not None:
            whole("evaluations", self.evaluations, 1)
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds is {self.seconds}; it must be positive and finite")
        one_of("then", self.then, ("deterministic", "end"))

    def check(self, problems: int, steps: int) -> None:
        """Raise ``ValueError`` where not even the deterministic rollout fits."""
        if self.evaluations is not None and self.then == "deterministic" and self.evaluations < problems * steps:
            raise ValueError(
                f"evaluations is {self.evaluations} and the deterministic rollout of {problems} problems over {steps} steps takes "
                f"{problems * steps}; give at least that, or then='end'"
            )

    def left(self, spent: int, rest: int) -> float:
        """Evaluations that a search step may take, with ``spent`` gone and ``rest`` needed to roll on deterministically behind it."""
        return math.inf if self.evaluations is None else self.evaluations - spent - (rest if self.then == "deterministic" else 0)

    def late(self, seconds: float) -> bool:
        return self.seconds is not None and seconds >= self.seconds
