"""Ranks scored candidates that come in chunks: the k best by value, tie-breaker and id, each state once, whatever the chunks.

Both searches rest on it: over states of a PDE (``ttcfast/ttc``) and over action sequences of an agent (``ttcfast/pwm/planning``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .keyed import philox_key
from .topk import topk

NO_ID = 2**40
"""The id of an empty place; candidate ids are smaller."""


@dataclass
class Keys:
    """The values that decide over candidates, each ``[n, m]``.

    Attributes:
        rank: Floating point, larger is better; -inf where a candidate cannot be taken.
        ids: int64, unique within a group; the smaller id wins a tie.
        scores: Floating point, carried along.
        ties: Floating point, the larger value wins a tie before the ids decide; None where only the ids do.
        marks: int64, equal for equal states; None where duplicates do not matter.
    """

    rank: Tensor
    ids: Tensor
    scores: Tensor
    ties: Tensor | None = None
    marks: Tensor | None = None

    @classmethod
    def empty(cls, n: int, k: int, rank: torch.dtype, device: torch.device, *, ties: bool = False, marks: bool = False) -> Keys:
        """Keys of ``n`` groups of ``k`` places that hold nothing yet; ``ties`` and ``marks`` say whether they have these columns."""
        lowest = torch.full((n, k), -torch.inf, dtype=rank, device=device)
        ids = torch.full((n, k), NO_ID, device=device)
        return cls(lowest, ids, lowest.clone(), lowest.clone() if ties else None, torch.zeros_like(ids) if marks else None)

    def columns(self) -> dict[str, Tensor]:
        return {name: value for name in ("rank", "ids", "scores", "ties", "marks") if (value := getattr(self, name)) is not None}

    def at(self, index: Tensor) -> Keys:
        """The entries ``[n, k]`` at positions ``index``."""
        return Keys(**{name: value.gather(1, index) for name, value in self.columns().items()})

    def rows(self, rows: slice | Tensor) -> Keys:
        return Keys(**{name: value[rows] for name, value in self.columns().items()})

    def beside(self, other: Keys) -> Keys:
        """Both, joined along the second axis."""
        theirs = other.columns()
        return Keys(**{name: torch.cat([value, theirs[name]], 1) for name, value in self.columns().items()})

    def among(self, wanted: Tensor) -> Keys:
        """The same keys, of which those outside ``wanted [n, m]`` cannot be taken."""
        return Keys(**{**self.columns(), "rank": self.rank.masked_fill(~wanted, -torch.inf)})


def best(keys: Keys, k: int) -> tuple[Keys, Tensor]:
    """The ``k`` best of every row, best first: by rank, then ``ties``, then the smaller id, without duplicates of a better one.

    Returns:
        Their keys and their positions ``[n, k]``. Places beyond the last candidate that can be taken have rank -inf and id ``NO_ID``.
    """
    width = keys.rank.shape[1]
    if keys.marks is not None:
        keys = keys.among(~_duplicates(keys))
    positions = torch.arange(width, device=keys.ids.device)
    if keys.ties is None:
        if width > 2**22:
            raise ValueError(f"a chunk holds {width} candidates of one problem; at most {2**22} can be told apart: set a chunk_size")
        _, packed = topk(keys.rank, k, ids=keys.ids * width + positions)  # one number holds both id and position
        index = packed % width
    else:
        order = _by_tie_and_id(keys)
        place = torch.empty_like(order).scatter_(1, order, positions.expand_as(order))
        _, places = topk(keys.rank, k, ids=place)
        index = order.gather(1, places)
    found = keys.at(index)
    found.ids = found.ids.masked_fill(found.rank == -torch.inf, NO_ID)
    return found, index


def marks_of(states: Tensor, axes: int) -> Tensor:
    """An int64 for each state beyond the first ``axes`` axes. Equal states have equal marks; others differ up to a chance of 2^-64."""
    flat = (states + 0.0).contiguous().flatten(axes)  # -0 becomes +0
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[flat.element_size()])
    return (words.long() * _odd_numbers(words.shape[-1], words.device)).sum(-1)


def _duplicates(keys: Keys) -> Tensor:
    """Whether a candidate has the mark of a better one, bool ``[n, m]``."""
    assert keys.marks is not None
    order = _by_tie_and_id(keys)
    order = order.gather(1, (-keys.rank).gather(1, order).argsort(dim=1, stable=True))
    order = order.gather(1, keys.marks.gather(1, order).argsort(dim=1, stable=True))
    marks, usable = keys.marks.gather(1, order), keys.rank.gather(1, order) > -torch.inf
    same = torch.zeros_like(usable)
    same[:, 1:] = (marks[:, 1:] == marks[:, :-1]) & usable[:, :-1]
    return torch.zeros_like(same).scatter_(1, order, same)


def _by_tie_and_id(keys: Keys) -> Tensor:
    order = keys.ids.argsort(dim=1, stable=True)
    if keys.ties is None:
        return order
    return order.gather(1, (-keys.ties).gather(1, order).argsort(dim=1, stable=True))


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """Fixed random odd numbers, int64 ``[count]``, made on the device so that the host need not wait."""
    low, high = philox_key(torch.arange(count, device=device), 0)
    return (high << 32) | low | 1
