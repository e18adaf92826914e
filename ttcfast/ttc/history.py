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
    Which rows descend from which is known on the host too, so that a step asks the device once, for the parents of its own rows.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self._parents: list[Tensor] = []  # of each layer, on the host
        self._needed: list[int] = []  # rows of each layer that something descended from when that was last looked at

    def add(self, states: Tensor, parent: Tensor, **notes: Tensor) -> None:
        """A new layer with a row for each survivor; ``parent`` counts the rows of the layer before, or problems in the first."""
        self.layers.append(Layer(states, torch.arange(len(parent), device=parent.device), parent, notes))

    def prune(self) -> None:
        """Drop the states that no row of the last layer descends from."""
        for layer in self.layers[len(self._parents) :]:  # one, or those that were read from a file
            self._parents.append(layer.parent.cpu())
            self._needed.append(len(layer.parent))
        needed = torch.arange(len(self._parents[-1]))
        for i in range(len(self.layers) - 2, -1, -1):
            needed = self._parents[i + 1][needed].unique()
            if len(needed) == self._needed[i]:
                return  # what is needed only ever gets less: here, and so in all layers before, it is what it was
            self._needed[i] = len(needed)
            if 2 * len(needed) <= len(self.layers[i].states):
                _keep(self.layers[i], needed.to(self.layers[i].parent.device))

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


def _keep(layer: Layer, needed: Tensor) -> None:
    """Drop the states of all rows but the needed ones."""
    layer.states = layer.states[layer.stored[needed]]
    layer.stored = torch.full_like(layer.stored, -1)
    layer.stored[needed] = torch.arange(len(needed), device=needed.device)
