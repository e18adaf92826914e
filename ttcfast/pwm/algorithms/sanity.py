"""Stops a training that has gone wrong: what is not finite, gradients and latents that explode, counted one by one."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from ttcfast.checks import at_least, whole

logger = logging.getLogger(__name__)

KINDS = ("nan", "gradient", "latent")


@dataclass
class SanityChecks:
    """Judges every update before it is made.

    Args:
        max_gradient_norm: largest norm, before clipping, of a gradient that is used.
        max_latent: largest magnitude of an entry of a predicted latent; on the simplices it is 1.
        patience: skipped updates in a row after which :attr:`stopped` is set; 0: never.

    Attributes:
        counts: how often each kind was found: ``"nan"`` (a loss, gradient or latent that is not finite), ``"gradient"``, ``"latent"``.
        skipped: updates that were skipped, in all.
        stopped: whether training should end.

    Source: Flow plan, "Verification and Invariants".
    """

    max_gradient_norm: float = 1e3
    max_latent: float = 1e2
    patience: int = 20
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0), init=False)
    skipped: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)
    in_a_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("max_gradient_norm", "max_latent"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0, inf for no limit")
        whole("patience", self.patience, 0)

    def allows(self, *, loss: float, gradient_norm: float, latent: float) -> bool:
        """Whether an update with these numbers is to be made; counts, logs, and sets :attr:`stopped` when patience is at its end."""
        found = self.judge(loss, gradient_norm, latent)
        if found is None:
            self.in_a_row = 0
            return True
        self.counts[found] += 1
        self.skipped += 1
        self.in_a_row += 1
        logger.warning("update skipped (%s): loss %.3g, gradient norm %.3g, largest latent %.3g", found, loss, gradient_norm, latent)
        if self.patience and self.in_a_row >= self.patience and not self.stopped:
            self.stopped = True
            logger.error("%d updates in a row were skipped (%s): training stops", self.in_a_row, self.counts)
        return False

    def judge(self, loss: float, gradient_norm: float, latent: float) -> str | None:
        """The kind of what is wrong, or None."""
        if not all(map(math.isfinite, (loss, gradient_norm, latent))):
            return "nan"
        if latent > self.max_latent:
            return "latent"
        return "gradient" if gradient_norm > self.max_gradient_norm else None

    def state_dict(self) -> dict[str, int | bool]:
        """The counters, for a checkpoint."""
        return {**self.counts, "skipped": self.skipped, "stopped": self.stopped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.counts = {kind: int(state[kind]) for kind in KINDS}
        self.skipped, self.stopped, self.in_a_row = int(state["skipped"]), bool(state["stopped"]), int(state["in_a_row"])
        at_least("skipped", self.skipped, 0)
