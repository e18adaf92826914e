"""Locates the states of a batch within a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class RowAxis:
    """Axis of a tensor that holds the M states of a batch, or how to treat a tensor that has none.

    Args:
        axis: The axis; it has ``outer * M * inner`` entries, in the order ``(outer M inner)``.
        outer: Entries outside the states: ``(4 M)`` is four blocks, each with all states.
        inner: Entries inside the states: ``(M 4)`` is four adjacent windows of each state.
        rows: ``"held"`` if the axis holds the states. Otherwise all states share the tensor, and each gets its own noise on a copy, along
            ``axis`` of size 1 (``"widened"``) or a ``"new"`` first axis; or all get the same noise (``"common"``), which depends on seed,
            step and site only.
        ndim: Number of axes of the tensor; None for any.

    Source: docs/design/decisions.md ("Row axes").
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1
    rows: Literal["held", "widened", "new", "common"] = "held"
    ndim: int | None = None

    @classmethod
    def by_size(cls, x: Tensor, m: int, sequence_first: bool) -> RowAxis | None:
        """Guesses from sizes alone which axis holds ``m`` states; None if no axis can.

        It is the first if its size is a multiple of ``m``, or 1, which is then widened. It is the second if the first is no multiple of
        ``m``, or in modules with ``sequence_first`` layout. A first axis that is a multiple by chance is mistaken for the states.
        """
        second = x.ndim > 1 and x.shape[1] == m
        first = x.ndim > 0 and x.shape[0] > 0 and (x.shape[0] % m == 0 or x.shape[0] == 1)
        if second and ((sequence_first and x.ndim == 3) or not first):
            return cls(1)
        if not first:
            return None
        return cls(0, 1, x.shape[0] // m) if x.shape[0] % m == 0 else cls(0, rows="widened")

    def fits(self, x: Tensor, m: int) -> bool:
        """Returns whether the shape of ``x`` is consistent with ``m`` states."""
        if self.ndim not in (None, x.ndim):
            return False
        if self.rows in ("new", "common"):
            return True
        return self.axis < x.ndim and x.shape[self.axis] == (1 if self.rows == "widened" else self.outer * m * self.inner)

    def in_front(self, x: Tensor, m: int) -> Tensor:
        """Returns ``[m * outer * inner, ...]``, state by state, or ``[1, ...]`` if noise is common; ``put_back`` is the inverse."""
        if self.rows in ("new", "common"):
            return x.expand(m if self.rows == "new" else 1, *x.shape)
        if self.rows == "widened":
            x = x.expand(*x.shape[: self.axis], m, *x.shape[self.axis + 1 :])
        x = x if self.axis == 0 else x.movedim(self.axis, 0)
        return x if self.outer == 1 else x.unflatten(0, (self.outer, m, self.inner)).movedim(1, 0).flatten(0, 2)

    def put_back(self, x: Tensor, m: int) -> Tensor:
        """Returns the result of ``in_front`` to the original layout."""
        if self.rows in ("new", "common"):
            return x if self.rows == "new" else x.squeeze(0)
        if self.outer > 1:
            x = x.unflatten(0, (m, self.outer, self.inner)).movedim(1, 0).flatten(0, 2)
        return x if self.axis == 0 else x.movedim(0, self.axis)


def over(values: Tensor, like: Tensor) -> Tensor:
    """Appends axes of size 1 to ``values``, so that they broadcast over ``like``."""
    return values.reshape(*values.shape, *[1] * (like.ndim - values.ndim))
