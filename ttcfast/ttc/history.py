"""The tree of states that a search over several beams has kept, and the way back through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layer:
    """What the beams of all problems were after a step.

    Attributes:
        states: ``[m, C, *S]``, of the rows that something still descends from.
        stored: int64 ``[M]``, where in ``states`` each row's is, -1 where it has been dropped.
        parent: int64 ``[M]``, row of the layer before; of the first layer, the problem.
        notes: what else is known of each row, ``[M]`` by name.
    """

    states: Tensor
    stored: Tensor
    parent: Tensor
    notes: dict[str, Tensor]


class History:
    """Layers, one a step, from which states without descendants are dropped.

    A layer's states are copied when half of them or less are still needed, so dropping costs less than one copy more of each survivor.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def add(self, states: Tensor, parent: Tensor, **notes: Tensor) -> None:
        """A new layer with a row for each survivor; ``parent`` counts the rows of the layer before, or problems in the first."""
        self.layers.append(Layer(states, torch.arange(len(parent), device=parent.device), parent, notes))

    def prune(self) -> None:
        """Drop the states that no row of the last layer descends from."""
        needed = torch.arange(len(self.layers[-1].parent), device=self.layers[-1].parent.device)
        for later, layer in zip(reversed(self.layers), reversed(self.layers[:-1])):
            needed = later.parent[needed].unique()
            kept = layer.stored[needed]
            if 2 * len(needed) <= len(layer.states):
                layer.states = layer.states[kept]
                layer.stored = torch.full_like(layer.stored, -1)
                layer.stored[needed] = torch.arange(len(needed), device=needed.device)

    def path(self, rows: Tensor) -> list[Tensor]:
        """For rows of the last layer, their ancestors' rows in every layer, first layer first: int64 ``[R]`` each."""
        found = []
        for layer in reversed(self.layers):
            found.append(rows)
            rows = layer.parent[rows]
        return found[::-1]

    def states(self, rows: Tensor) -> Tensor:
        """The states along the paths to rows of the last layer, ``[R, steps, C, *S]``."""
        return torch.stack([layer.states[layer.stored[at]] for layer, at in zip(self.layers, self.path(rows))], 1)

    def along(self, name: str, rows: Tensor) -> Tensor:
        """A note along those paths, ``[R, steps]``."""
        return torch.stack([layer.notes[name][at] for layer, at in zip(self.layers, self.path(rows))], 1)

    @property
    def held(self) -> int:
        """States that are kept."""
        return sum(len(layer.states) for layer in self.layers)
