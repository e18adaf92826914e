"""Modules around models whose axes, arguments or outputs are not those that a surrogate calls."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.checks import whole


class Adapter(nn.Module):
    """Base class of the adapters: a model, and keyword arguments that every call of it gets.

    Names of modules in a ``StochasticConfig`` may be those within the model.
    """

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; give an nn.Module")
        self._adapted, self.arguments = model, dict(arguments or {})

    def call(self, x: Tensor, **given: Any) -> Any:
        """Calls the model with its fixed and the given arguments."""
        return self._adapted(x, **{**self.arguments, **given})


class _ChannelsLast(Adapter):
    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return tensor_of(self.call(x.movedim(1, -1), **given)).movedim(-1, 1)


class _TimeFirst(Adapter):
    def __init__(self, model: nn.Module, history: int, arguments: Mapping[str, Any]) -> None:
        super().__init__(model, arguments)
        whole("history", history, 1)
        self.history = int(history)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        if x.shape[1] % self.history:
            raise ValueError(f"x has {x.shape[1]} channels for history={self.history} frames; give the surrogate the same history")
        frames = x.unflatten(1, (self.history, -1)).movedim(1, 0)  # [T, M, C, *S]
        out = tensor_of(self.call(frames, **given))
        return out[-1] if out.ndim == frames.ndim else out


class _Output(Adapter):
    def __init__(self, model: nn.Module, field: str | int | None, arguments: Mapping[str, Any]) -> None:
        super().__init__(model, arguments)
        self.field = field

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        return tensor_of(self.call(x, **given), self.field)


class _Scot(_Output):
    def __init__(self, model: nn.Module, lead_time: float) -> None:
        super().__init__(model, "output", {})
        self.lead_time = float(lead_time)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        given.setdefault("time", x.new_full((len(x),), self.lead_time))
        return tensor_of(self.call(x, **given), self.field)


def channels_last(model: nn.Module, **arguments: Any) -> nn.Module:
    """Adapts a model that takes and returns ``[M, *S, C]`` to the axes ``[M, C, *S]`` of a surrogate.

    Args:
        model: The model.
        arguments: Keyword arguments of every call; those of each state come from ``Surrogate(inputs=...)``.
    """
    return _ChannelsLast(model, arguments)


def time_first(model: nn.Module, history: int = 1, **arguments: Any) -> nn.Module:
    """Adapts a model whose input is ``[T, M, C, *S]``, such as the AViT of Multiple Physics Pretraining.

    Args:
        model: Returns the next state ``[M, C, *S]``, or frames ``[T', M, C, *S]`` of which the last is the next state.
        history: Number T of frames, as for the surrogate.
        arguments: Keyword arguments of every call, such as ``state_labels`` and ``bcs``.
    """
    return _TimeFirst(model, history, arguments)


def hf(model: nn.Module, field: str | int | None = None, **arguments: Any) -> nn.Module:
    """Adapts a model that returns a ``ModelOutput``, a dict, another object or a tuple.

    Args:
        model: The model; its first argument takes the states.
        field: Name or index of the entry that is the next state; None takes the only tensor, or the first one of a tuple.
        arguments: Keyword arguments of every call.
    """
    return _Output(model, field, arguments)


def scot(model: nn.Module | str | Path, *, lead_time: float = 1 / 20, **options: Any) -> nn.Module:
    """Adapts Poseidon's scOT: its input ``time`` and its ``ScOTOutput``.

    The model adds its input itself where its configuration says ``learn_residual``, so that it predicts a state either way.

    Args:
        model: A ScOT, or the folder (or name) for ``ScOT.from_pretrained``, which takes Poseidon's repository on the path.
        lead_time: Lead time of a step in the unit of training, where the trajectories of PDEGym take 1.
        options: Keyword arguments of ``from_pretrained``.

    Source: M. Herde et al., "Poseidon: Efficient Foundation Models for PDEs", 2024.
    """
    if not isinstance(model, nn.Module):
        try:
            from scOT.model import ScOT
        except ImportError as error:
            raise ImportError(f"model is {str(model)!r}, which needs Poseidon's package scOT; install its repository") from error
        loaded: nn.Module = ScOT.from_pretrained(str(model), **options)
        return _Scot(loaded, lead_time)
    if options:
        raise ValueError(f"{', '.join(options)} are for from_pretrained, and model is one already; leave them out")
    if "time" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__}.forward has no argument time; give a ScOT, or use adapters.hf")
    return _Scot(model, lead_time)


def tensor_of(output: Any, field: str | int | None = None) -> Tensor:
    """Returns the tensor ``field`` of a model's output.

    Raises:
        ValueError: There is no such tensor, or ``field`` is None and several have a name; the message lists them.
    """
    if isinstance(output, Tensor) and field is None:
        return output
    if isinstance(output, Mapping):
        entries = dict(output)
    elif isinstance(output, tuple) and hasattr(output, "_asdict"):
        entries = output._asdict()
    elif isinstance(output, (tuple, list)):
        entries = dict(enumerate(output))
    elif dataclasses.is_dataclass(output):
        entries = {f.name: getattr(output, f.name) for f in dataclasses.fields(output)}
    else:
        entries = {}
    if isinstance(field, int) and entries and field not in entries and -len(entries) <= field < len(entries):
        return tensor_of(list(entries.values())[field])
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    if field is None and tensors and (len(tensors) == 1 or isinstance(output, (tuple, list))):
        return next(iter(tensors.values()))
    if field in tensors:
        return tensors[field]
    held = ", ".join(f"{name!r} {tuple(t.shape)}" for name, t in tensors.items()) or "no tensor"
    raise ValueError(f"field is {field!r} and the model returned a {type(output).__name__} with {held}; name one of its tensors")


def no_gradient(*values: Any) -> list[Tensor]:
    """Returns detached floating-point copies."""
    tensors = [torch.as_tensor(value).detach() for value in values]
    return [(t if t.is_floating_point() else t.float()).clone() for t in tensors]
