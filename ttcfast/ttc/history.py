"""Holds the tree of states that leads to the beams of a rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ttcfast.transfer import sent

ALONG_PATH = {"chosen": -1, "collapsed": False, "unprojected": False}  # notes of a path, and their default values


@dataclass
class Layer:
    """The beams of all problems after one step.

    Attributes:
        states: ``[m, C, *S]``, states of the rows that still have descendants.
        stored: int64 ``[M]``, index of each row's state in ``states``, -1 once it is dropped.
        parent: int64 ``[M]``, row of the layer before; in the first layer, the problem.
        notes: Further columns ``[M]`` by name.
    """

    states: Tensor
    stored: Tensor
    parent: Tensor
    notes: dict[str, Tensor]


class History:
    """One layer for each step, from which states without descendants are dropped.

    A layer's states are copied once half of them or fewer are needed, so that dropping costs less than one more copy of each survivor. The
    tree is known on the host too, where a search adds the parents of its rows, so that dropping waits for no device.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self._parents: list[Tensor] = []  # of each layer, on the host
        self._needed: list[int] = []  # rows of each layer that had descendants at the last count

    def add(self, states: Tensor, parent: Tensor, known: Tensor | None = None, **notes: Tensor) -> None:
        """Add a layer with one row for each survivor.

        ``parent`` counts the rows of the layer before, or problems in the first; ``known`` is the same on the host, where it is at hand.
        """
        self.layers.append(Layer(states, torch.arange(len(parent), device=parent.device), parent, notes))
        if known is not None and len(self._parents) == len(self.layers) - 1:
            self._look_at(known)

    def prune(self) -> None:
        """Drop the states from which no row of the last layer descends."""
        for layer in self.layers[len(self._parents) :]:  # all entries read from a file
            self._look_at(layer.parent.cpu())
        needed = torch.arange(len(self._parents[-1]))
        for i in range(len(self.layers) - 2, -1, -1):
            needed = torch.unique(self._parents[i + 1][needed])
            if len(needed) == self._needed[i]:
                return  # the number of needed rows falls with every step, so this layer and all before it are unchanged
            self._needed[i] = len(needed)
            layer = self.layers[i]
            if 2 * len(needed) <= len(layer.states):
                rows = sent(needed, layer.parent.device)
                layer.states = layer.states[layer.stored[rows]]
                layer.stored = torch.full_like(layer.stored, -1)
                layer.stored[rows] = torch.arange(len(rows), device=rows.device)

    def _look_at(self, parent: Tensor) -> None:
        self._parents.append(parent)
        self._needed.append(len(parent))

    def fill(self, into: dict[str, Tensor], problems: Tensor, rows: Tensor) -> None:
        """Write the paths to ``rows [R]`` of the last layer into ``states [n, T+1, C, *S]`` and notes ``[n, T]`` at ``problems [R]``."""
        for t, layer in reversed(list(enumerate(self.layers))):
            into["states"][problems, t + 1] = layer.states[layer.stored[rows]]
            for name in ALONG_PATH:
                into[name][problems, t] = layer.notes[name][rows]
            rows = layer.parent[rows]

    @property
    def held(self) -> int:
        """Number of states kept."""
        return sum(len(layer.states) for layer in self.layers)
