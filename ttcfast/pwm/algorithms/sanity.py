"""Skips updates that have gone wrong, and stops a training in which too many do."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ttcfast.checks import whole
from ttcfast.runtime.training import TrainingError

logger = logging.getLogger(__name__)

KINDS = ("nan", "gradient", "latent")
WINDOW = 100  # accepted gradient norms whose median is the usual one
FEWEST = 10  # accepted gradient norms before any is judged
WIDEST = 1000  # doublings of the limit, which 2.0**1024 would overflow


@dataclass
class SanityChecks:
    """Judges every update before it is made.

    The limit of the gradient norm doubles with every update skipped in a row. Skipped updates leave the parameters as they are, so norms
    that stay large are no odd batch but the model's own: a training whose gradients have grown by a factor f beyond the limit goes on after
    about log2(f) skipped updates and measures its usual norm anew, and one that exploded beyond ``2**patience`` times the limit is stopped.

    Args:
        max_gradient_ratio: Largest gradient norm, before clipping, with which an update is made, relative to the median of the last 100
            updates that were made; the first 10 are not limited. inf for no limit.
        max_latent: Largest latent of the rollout, in the unit of ``WorldModelLoss.largest_latent``; inf for no limit.
        patience: Number of consecutive skipped updates that sets :attr:`stopped`; 0 for never.

    Attributes:
        counts: Skipped updates by reason: ``"nan"`` (loss, gradient or latent not finite), ``"gradient"``, ``"latent"``.
        stopped: Whether training should end.
        in_a_row: Skipped updates since the last one that was made.
        norms: Gradient norms of the last updates that were made.

    Source: Flow plan, "Verification and Invariants".
    """

    max_gradient_ratio: float = 1e2
    max_latent: float = 1e2
    patience: int = 20
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0), init=False)
    stopped: bool = field(default=False, init=False)
    in_a_row: int = field(default=0, init=False)
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)

    def __post_init__(self) -> None:
        for name in ("max_gradient_ratio", "max_latent"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0, inf for no limit")
        whole("patience", self.patience, 0)

    def allows(self, *, loss: float, gradient_norm: float, latent: float) -> bool:
        """Return whether to make an update with these numbers; if not, count and log it, and set :attr:`stopped` when patience runs out."""
        limit = self._limit()
        if not all(map(math.isfinite, (loss, gradient_norm, latent))):
            found = "nan"
        elif latent > self.max_latent:
            found = "latent"
        elif gradient_norm > limit * 2.0 ** min(self.in_a_row, WIDEST):
            found = "gradient"
        else:
            if gradient_norm > limit:
                self.norms.clear()
            self.norms.append(gradient_norm)
            self.in_a_row = 0
            return True
        self.counts[found] += 1
        self.in_a_row += 1
        logger.warning("update skipped (%s): loss %.3g, gradient norm %.3g, largest latent %.3g", found, loss, gradient_norm, latent)
        if self.patience and self.in_a_row >= self.patience and not self.stopped:
            self.stopped = True
            logger.error("%d updates in a row were skipped (%s): training stops", self.in_a_row, self.counts)
        return False

    def _limit(self) -> float:
        """Return the largest gradient norm that is usual, inf if too few are known."""
        usual = median(self.norms) if len(self.norms) >= FEWEST else 0.0
        return self.max_gradient_ratio * usual if usual > 0 else math.inf

    def require_running(self) -> None:
        """Raise ``TrainingError`` once :attr:`stopped` is set."""
        if self.stopped:
            raise TrainingError(
                f"training was stopped after {self.in_a_row} skipped updates in a row ({self.counts}); lower lr or mend the data and go on "
                "from an earlier state, or give the sanity checks wider limits or patience=0"
            )

    @property
    def skipped(self) -> int:
        """Number of skipped updates."""
        return sum(self.counts.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the gradient norms, for a checkpoint."""
        return {**self.counts, "stopped": self.stopped, "in_a_row": self.in_a_row, "norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.counts = {kind: int(state[kind]) for kind in KINDS}
        self.stopped, self.in_a_row = bool(state["stopped"]), int(state["in_a_row"])
        self.norms = deque(map(float, state["norms"]), maxlen=WINDOW)
