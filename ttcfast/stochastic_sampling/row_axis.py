"""Where in a tensor the states of a batch stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class RowAxis:
    """The axis of a tensor that belongs to the M states of a batch, or what is done about there being none.

    Args:
        axis: the axis.
        outer: entries of the axis that stand outside the states,
        inner: and inside them: it has ``outer * M * inner`` entries, ``(outer M inner)``. ``(M 4)`` are four windows of each state beside
            one another, ``(4 M)`` four times, each with all states.
        rows: ``"held"``: as said. A tensor that is the same for all states gets an entry for each, so that each has its own noise:
            ``"widened"`` along ``axis``, which is of size 1, or as a ``"new"`` first axis; or its noise is the same for all states,
            ``"common"``, and depends on seed, step and site alone.
        ndim: axes that the tensor has; None for any number.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1
    rows: Literal["held", "widened", "new", "common"] = "held"
    ndim: int | None = None

    @classmethod
    def by_size(cls, x: Tensor, m: int, sequence_first: bool) -> RowAxis | None:
        """Which axis may hold ``m`` states as far as sizes tell; None if no axis may.

        The first, alone or with a multiple of them behind one another; of size 1 it is widened. The second where the first is no multiple
        of ``m``, or in modules of ``sequence_first`` layout. A first axis that is a multiple by chance is taken for the states'.
        """
        second = x.ndim > 1 and x.shape[1] == m
        first = x.ndim > 0 and x.shape[0] > 0 and (x.shape[0] % m == 0 or x.shape[0] == 1)
        if second and ((sequence_first and x.ndim == 3) or not first):
            return cls(1)
        if not first:
            return None
        return cls(0, 1, x.shape[0] // m) if x.shape[0] % m == 0 else cls(0, rows="widened")

    def fits(self, x: Tensor, m: int) -> bool:
        """Whether a tensor may be so for ``m`` states."""
        if self.ndim not in (None, x.ndim):
            return False
        if self.rows in ("new", "common"):
            return True
        return self.axis < x.ndim and x.shape[self.axis] == (1 if self.rows == "widened" else self.outer * m * self.inner)

    def in_front(self, x: Tensor, m: int) -> Tensor:
        """``[m * outer * inner, ...]``, state by state, of which ``put_back`` is the inverse; ``[1, ...]`` of what is common."""
        if self.rows in ("new", "common"):
            return x.expand(m if self.rows == "new" else 1, *x.shape)
        if self.rows == "widened":
            x = x.expand(*x.shape[: self.axis], m, *x.shape[self.axis + 1 :])
        x = x if self.axis == 0 else x.movedim(self.axis, 0)
        return x if self.outer == 1 else x.unflatten(0, (self.outer, m, self.inner)).movedim(1, 0).flatten(0, 2)

    def put_back(self, x: Tensor, m: int) -> Tensor:
        if self.rows in ("new", "common"):
            return x if self.rows == "new" else x.squeeze(0)
        if self.outer > 1:
            x = x.unflatten(0, (m, self.outer, self.inner)).movedim(1, 0).flatten(0, 2)
        return x if self.axis == 0 else x.movedim(0, self.axis)
