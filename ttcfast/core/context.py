"""Where a rollout stands: what models with conditions and scorers may depend on besides the states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ttcfast.transfer import sent


@dataclass(frozen=True)
class StepContext:
    """Locates a call of a model or a scorer within a rollout.

    Attributes:
        step: Index t of the current states; the candidates are for t + 1. With history, the latest frame that a rollout starts from is
            frame 0.
        problem_ids: Problem that each state belongs to, int64 ``[N]``.
        time: Time of the current states since frame 0, step times the surrogate's ``time_step``; None where that is not known.
        known: The problem ids on the host, which can be read without waiting for the device; None where they are on the device alone.
    """

    step: int
    problem_ids: Tensor
    time: float | None = None
    known: Tensor | None = None

    @classmethod
    def at(cls, step: int, problem_ids: Tensor, time_step: float | None, known: Tensor | None = None) -> StepContext:
        """Returns the context of a step of a model with this time step."""
        return cls(step, problem_ids, None if time_step is None else step * time_step, known)

    @property
    def on_host(self) -> Tensor:
        """The problem ids on the host; waits for the device where they are not ``known``."""
        return self.problem_ids.cpu() if self.known is None else self.known

    def repeated(self, count: int) -> StepContext:
        """Returns the context of ``count`` copies of each state."""
        known = None if self.known is None else self.known.repeat_interleave(count)
        return replace(self, problem_ids=self.problem_ids.repeat_interleave(count), known=known)


def window_at(frames: Tensor, step: int, history: int) -> Tensor:
    """Returns what a model that sees ``history`` frames takes at a step: ``[N, C, *S]``, above one frame ``[N, h, C, *S]``.

    Args:
        frames: ``[N, T, C, *S]``, of which frame h - 1 is the state at step 0.
        step: Index of the state from which the model steps.
        history: h, number of frames that the model sees.
    """
    return frames[:, step] if history == 1 else frames[:, step : step + history]


Inputs: TypeAlias = Callable[[StepContext], Mapping[str, Any]]
"""Returns keyword arguments of a model for the states of a context: numbers for all of them, or tensors with one entry for each."""


def conditions(inputs: Inputs | None, context: StepContext, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns keyword arguments with one entry per state, ``[N, ...]`` each.

    Args:
        inputs: Function of the context; None means no arguments.
        context: The step, and the problems of the N states.
        device, dtype: Those of the model; the dtype is for numbers.

    Raises:
        ValueError: A tensor has not one entry per state, or there is no mapping.
    """
    if inputs is None:
        return {}
    given, n, found = inputs(context), len(context.problem_ids), {}
    if not isinstance(given, Mapping):
        raise ValueError(f"inputs returned a {type(given).__name__}; return a dict of the model's keyword arguments")
    for name, value in given.items():
        if isinstance(value, (int, float)):
            value = torch.full((n,), value, dtype=dtype if isinstance(value, float) else None, device=device)
        elif isinstance(value, Tensor) and value.ndim == 0:
            value = value.expand(n)
        if not isinstance(value, Tensor) or value.shape[0] != n:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if value is None and context.time is None:
                raise ValueError(f"inputs returned {name!r} of None, and the time is not known; give Surrogate(..., time_step=)")
            raise ValueError(
                f"inputs returned {name!r} of {what} for {n} states; return a number, or a tensor with one entry for each state "
                "(select by context.problem_ids)"
            )
        found[name] = value.to(device)
    return found


def require_taken(model: nn.Module, names: Collection[str]) -> None:
    """Raises ``ValueError`` for a keyword argument that the model's forward does not take.

    What hooks do with keywords, or a forward without a signature, is not known here and passes.
    """
    hooked = bool(getattr(model, "_forward_pre_hooks_with_kwargs", None))
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # written in C++ or compiled
        return
    if hooked or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    taken = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]  # the first is the state
    if missing := [name for name in names if name not in taken]:
        raise ValueError(
            f"inputs returned {', '.join(map(repr, missing))} and {type(model).__name__}.forward takes no such argument besides the state "
            f"(it takes {', '.join(taken) or 'none'}); give it that argument, or leave it out of Surrogate(inputs=...)"
        )


def repeated(given: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Returns the arguments of each state's candidates, ``[N * count, ...]``, problem-major."""
    return {name: value.repeat_interleave(count, 0) for name, value in given.items()}


def rows_of(given: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Returns the arguments of some states."""
    return {name: value[rows] for name, value in given.items()}


def candidate_rows(ids: Tensor, problem_ids: Tensor | None, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns (problem, candidate) of each state in a batch of candidates, int64 ``[n * B, 2]``, problem-major.

    Args:
        ids: Candidate ids ``[B]``, or ``[n, B]`` for each state, whole numbers.
        problem_ids: Problem ids ``[n]``, whole numbers; None counts from 0.
        n: Number of problems in the batch.
        device: Device of the batch.

    Raises:
        ValueError: A shape or dtype does not fit; on the CPU also for a number below 0, or a problem of 2^32 or more.
    """
    if ids.ndim not in (1, 2) or ids.numel() == 0 or not _whole(ids) or (ids.ndim == 2 and len(ids) != n):
        raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}; give at least one integer id, [B], or as many for each of {n} states")
    problems = torch.arange(n) if problem_ids is None else problem_ids
    if tuple(problems.shape) != (n,) or not _whole(problems):
        raise ValueError(f"problem_ids are {problems.dtype} {tuple(problems.shape)}; give one integer for each of the {n} problems")
    for name, values, end in (("ids", ids, 2**63), ("problem_ids", problems, 2**32)):
        if not values.is_cuda and not 0 <= int(values.min()) <= int(values.max()) < end:
            raise ValueError(f"{name} are {int(values.min())} to {int(values.max())}; give numbers from 0 to {end - 1}")
    problems, ids = (sent(values.to(torch.int64), torch.device(device)) for values in (problems, ids))
    if ids.ndim == 1:
        return torch.cartesian_prod(problems, ids)
    return torch.stack([problems.unsqueeze(1).expand_as(ids), ids], 2).flatten(0, 1)


def _whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
