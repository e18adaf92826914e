"""Skips updates that have gone wrong, and stops a training in which too many do."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from ttcfast.checks import whole

logger = logging.getLogger(__name__)

KINDS = ("nan", "gradient", "latent")


@dataclass
class SanityChecks:
    """Judges every update before it is made.

    Args:
        max_gradient_norm: Largest gradient norm, before clipping, with which an update is made.
        max_latent: Largest magnitude allowed in predicted latents; on the simplices it is 1.
        patience: Number of consecutive skipped updates that sets :attr:`stopped`; 0 for never.

    Attributes:
        counts: Skipped updates by reason: ``"nan"`` (loss, gradient or latent not finite), ``"gradient"``, ``"latent"``.
        stopped: Whether training should end.

    Source: Flow plan, "Verification and Invariants".
    """

    max_gradient_norm: float = 1e3
    max_latent: float = 1e2
    patience: int = 20
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0), init=False)
    stopped: bool = field(default=False, init=False)
    in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("max_gradient_norm", "max_latent"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0, inf for no limit")
        whole("patience", self.patience, 0)

    def allows(self, *, loss: float, gradient_norm: float, latent: float) -> bool:
        """Return whether to make an update with these numbers; if not, count and log it, and set :attr:`stopped` when patience runs out."""
        if not all(map(math.isfinite, (loss, gradient_norm, latent))):
            found = "nan"
        elif latent > self.max_latent:
            found = "latent"
        elif gradient_norm > self.max_gradient_norm:
            found = "gradient"
        else:
            self.in_a_row = 0
            return True
        self.counts[found] += 1
        self.in_a_row += 1
        logger.warning("update skipped (%s): loss %.3g, gradient norm %.3g, largest latent %.3g", found, loss, gradient_norm, latent)
        if self.patience and self.in_a_row >= self.patience and not self.stopped:
            self.stopped = True
            logger.error("%d updates in a row were skipped (%s): training stops", self.in_a_row, self.counts)
        return False

    @property
    def skipped(self) -> int:
        """Number of skipped updates."""
        return sum(self.counts.values())

    def state_dict(self) -> dict[str, int | bool]:
        """Return the counters, for a checkpoint."""
        return {**self.counts, "stopped": self.stopped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue from :meth:`state_dict`."""
        self.counts = {kind: int(state[kind]) for kind in KINDS}
        self.stopped, self.in_a_row = bool(state["stopped"]), int(state["in_a_row"])
