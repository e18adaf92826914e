"""Records the step of a greedy search as a CUDA graph, which the host launches as one thing instead of hundreds."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.ops.keyed import held_stream

from .paths import Beams, Known, Survivors

_WARM = 2  # steps made before one is recorded: they compile kernels, trace the model and copy constants


class Outcome(NamedTuple):
    """A step of n problems, all of which find a candidate.

    Attributes:
        missed: bool ``[n]``, problems that found none, so that the step is to be made in another way.
        kept: The new states, in final form.
        columns: ``scores [n, B]``, and ``unprojected``, ``nonfinite`` and ``distinct`` ``[n]``, as in ``StepOutput``.
        spent: What the host counts: evaluations and the like.
    """

    missed: Tensor
    kept: Survivors
    columns: dict[str, Tensor]
    spent: dict[str, Any]

    def copied(self) -> Outcome:
        """The same in memory of its own."""
        held = {f.name: getattr(self.kept, f.name) for f in dataclasses.fields(self.kept) if f.name != "parent"}  # which the host has
        copies: dict[str, Any] = {name: value.clone() for name, value in held.items() if isinstance(value, Tensor)}
        columns = {name: value.clone() for name, value in self.columns.items()}
        return Outcome(self.missed, dataclasses.replace(self.kept, **copies), columns, self.spent)


Step = Callable[[Beams], Outcome]


class StepGraphs:
    """The recorded steps of one rollout, by the number of problems that go on."""

    def __init__(self) -> None:
        self._held: dict[torch.Size, int | _StepGraph] = {}
        self._fails = False

    def __call__(self, step: Step, beams: Beams, stream: int) -> Outcome | None:
        """Make a step from its record, or return None where it is to be made without one.

        Args:
            step: Makes the step, of fixed shapes and without a wait; called to record it.
            beams: The states being left.
            stream: The 64 bits of seed and step, from ``ops.keyed.mixed``, which name the step's random numbers.
        """
        key = beams.window.shape
        held = self._held.get(key, 0)
        if self._fails or (isinstance(held, int) and held < _WARM):
            self._held[key] = _WARM if isinstance(held, _StepGraph) else held + 1
            return None
        if not isinstance(held, _StepGraph):
            try:
                held = self._held[key] = _StepGraph(step, beams)
            except RuntimeError as error:  # something waits, or torch cannot record it
                self._fails, why = True, str(error).splitlines()[0]
                warnings.warn(f"the search's step is not recorded as a CUDA graph ({why})", RuntimeWarning, stacklevel=2)
                return None
        return held(beams, stream)


class _StepGraph:
    """One recorded step. States, problem ids and the random stream are tensors of its own, written before every replay."""

    def __init__(self, step: Step, beams: Beams) -> None:
        ids = beams.problem_ids.clone()
        there = Known(beams.problem.clone(), beams.beam.clone(), ids)  # nothing is taken from the host while a graph is recorded
        self._beams = Beams(beams.window.clone(), *there, torch.zeros_like(beams.offset), beams.history, there)
        self._stream = torch.zeros(1, dtype=torch.int64, device=beams.window.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph), held_stream(self._stream):
            self._outcome = step(self._beams)

    def __call__(self, beams: Beams, stream: int) -> Outcome:
        self._beams.window.copy_(beams.window)
        self._beams.problem_ids.copy_(beams.problem_ids)
        self._stream.fill_(stream)
        self._graph.replay()
        return self._outcome
