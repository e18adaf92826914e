"""Limits the model evaluations and the time of a rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ttcfast.checks import one_of, whole


@dataclass(frozen=True)
class Budget:
    """A limit on a rollout, checked before every step.

    Args:
        evaluations: Model evaluations of all problems together. A search step, or a group drawn again, is left out if it, the fallback of
            its beams (which costs evaluations with ``include_deterministic=False``) and the deterministic rest would not fit. Exceeded only
            where all candidates of the first step are alike, by the 16 candidates of its first problem (or a chunk's, if that is more) that
            are drawn before the model is called deterministic.
        seconds: No search step begins later than this. The step under way and the deterministic rest come on top.
        then: ``"deterministic"`` continues each problem's best beam by the deterministic step, one evaluation per step (of a ``Blend`` one
            per surrogate); ``"end"`` ends the rollout and its trajectory.

    Raises:
        ValueError: Neither limit is given, one is not positive, or ``then`` is unknown.
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

    def check(self, problems: int, steps: int, first: int, each: int = 1) -> None:
        """Raise ``ValueError`` if not even the deterministic rollout fits, or before an end the first step.

        Args:
            problems, steps: Those of the rollout.
            first: Evaluations of the first step.
            each: Evaluations of a deterministic step.
        """
        rest = problems * steps * each
        if self.evaluations is not None and self.then == "end" and self.evaluations < first:
            raise ValueError(
                f"evaluations is {self.evaluations} and the first step takes {first}; give at least that, or then='deterministic'"
            )
        if self.evaluations is not None and self.then == "deterministic" and self.evaluations < rest:
            raise ValueError(
                f"evaluations is {self.evaluations} and the deterministic rollout of {problems} problems over {steps} steps takes "
                f"{rest}; give at least that, or then='end'"
            )

    def left(self, spent: int, rest: int) -> float:
        """Evaluations that a step may take when ``spent`` are gone and ``rest`` are needed to continue deterministically."""
        return math.inf if self.evaluations is None else self.evaluations - spent - (rest if self.then == "deterministic" else 0)

    def late(self, seconds: float) -> bool:
        """Whether the time is up after ``seconds``."""
        return self.seconds is not None and seconds >= self.seconds
