"""What a planner may be told about its search."""

from __future__ import annotations

from dataclasses import dataclass

from ttcfast.checks import at_least, one_of, whole
from ttcfast.runtime.errors import ArgumentError

METHODS = ("mppi", "cem", "beam")


@dataclass(frozen=True)
class PlanSettings:
    """How action sequences are searched.

    Args:
        horizon: Steps that a plan looks ahead.
        samples: Sequences drawn in each iteration ("mppi", "cem"), or actions tried from each beam at each step ("beam").
        method: ``"mppi"``, ``"cem"`` or ``"beam"``.
        gamma: Discount per step, in (0, 1].
        iterations: Rounds of drawing and refitting ("mppi", "cem").
        elites: Best sequences that mean and deviation are refitted to ("mppi", "cem"); None for an eighth of ``samples``, at most 64.
        temperature: Inverse scale of the values in the elites' weights ``softmax(temperature * value)`` ("mppi"); at 0 it is CEM.
        std_min: Least standard deviation of the drawn actions ("mppi", "cem").
        std_max: Greatest one, from which every search starts ("mppi", "cem").
        width: Beams kept after each step ("beam").
        policy_samples: Sequences by which the policy itself takes part: one of its own actions, the others with noise added.
        policy_noise: Standard deviation of the noise added to actions of the policy.
        chunk_size: Model steps evaluated at once, over all problems, which bounds the memory; it does not change the plan.

    Raises:
        ArgumentError: A value is out of range.

    The defaults of "mppi" are those of TD-MPC2 (Hansen, Su and Wang, 2023).
    """

    horizon: int
    samples: int
    method: str = "mppi"
    gamma: float = 0.99
    iterations: int = 6
    elites: int | None = None
    temperature: float = 0.5
    std_min: float = 0.05
    std_max: float = 2.0
    width: int = 16
    policy_samples: int = 24
    policy_noise: float = 0.3
    chunk_size: int = 4096

    def __post_init__(self) -> None:
        try:
            self._check()
        except ArgumentError:
            raise
        except ValueError as error:
            raise ArgumentError(str(error)) from None

    @property
    def elite_count(self) -> int:
        """``elites`` with its default resolved."""
        return max(1, min(64, self.samples // 8)) if self.elites is None else self.elites

    def _check(self) -> None:
        one_of("method", self.method, METHODS)
        for name in ("horizon", "samples", "iterations", "width", "policy_samples", "chunk_size"):
            whole(name, getattr(self, name), 1)
        if self.elites is not None:
            whole("elites", self.elites, 1)
            if self.method != "beam" and self.elites > self.samples:
                raise ArgumentError(f"elites is {self.elites} and samples {self.samples}; choose at most as many elites as samples")
        if not 0 < self.gamma <= 1:
            raise ArgumentError(f"gamma is {self.gamma}; a discount lies in (0, 1]")
        for name in ("temperature", "std_min", "policy_noise"):
            at_least(name, getattr(self, name), 0)
        if not self.std_min <= self.std_max < float("inf"):
            raise ArgumentError(f"std_min is {self.std_min} and std_max {self.std_max}; give finite deviations, std_min at most std_max")
