"""Handles outputs of modules, tensors in any nesting of tuples, lists and dicts: repeating rows, copying, comparing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

# Relative to the largest entry: the effect of other matrix shapes in a deep model. Mixed-up rows differ by far more.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PLAIN = (type(None), bool, int, float, str)  # outputs other than tensors that are supported


def with_each(values: Sequence[Any], output: Any, function: Callable[[Tensor, Any], Tensor]) -> Any:
    """Applies ``function`` to each tensor of an output and its value."""
    each = iter(values)
    return map_tensors(lambda t: function(t, next(each)), output)


def repeat_rows(t: Tensor, axis: int | None, problems: int, count: int, *, stored: bool = True) -> Tensor:
    """Repeats each problem's part of ``axis`` (``[..., N * r, ...]``) ``count`` times, ``[..., N * count * r, ...]``, in new memory.

    With ``stored`` False the result only has the right shape (``stand_in``).
    """
    if not stored:
        return stand_in(t, [size * count if d == axis else size for d, size in enumerate(t.shape)])
    if axis is None:
        return t.clone()
    order = sorted(range(t.ndim), key=t.stride, reverse=True)  # preserved, since a model may rely on it (view)
    at = order.index(axis)
    parts = t.permute(order).unflatten(at, (problems, 1, t.shape[axis] // problems))
    wide = parts.expand(*parts.shape[: at + 1], count, *parts.shape[at + 2 :]).clone(memory_format=torch.contiguous_format)
    return wide.flatten(at, at + 2).permute([order.index(d) for d in range(t.ndim)])


def stand_in(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns a tensor of this shape that stores one number: NaN, so that any use of it shows."""
    return t.new_full((), torch.nan if t.is_floating_point() or t.is_complex() else 0).expand(*shape)


def tensors_of(output: Any) -> list[Tensor]:
    """Returns the tensors of an output, in order."""
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Applies ``function`` to every tensor of an output."""
    return tree_map_only(Tensor, function, output)


def same_structure(a: Any, b: Any) -> bool:
    """Returns whether two outputs have the same nesting, tensors of the same dtypes, and equal plain values."""
    (ours, one), (theirs, two) = tree_flatten(a), tree_flatten(b)
    return one == two and all(
        p.dtype == q.dtype if isinstance(p, Tensor) and isinstance(q, Tensor) else isinstance(p, _PLAIN) and type(p) is type(q) and p == q
        for p, q in zip(ours, theirs)
    )


def first_line(error: BaseException) -> str:
    """Returns the first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def close(a: Tensor, b: Tensor, precision: torch.dtype | None) -> bool:
    """Returns whether two tensors are equal up to rounding, with NaN and infinities in the same places."""
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    finite = b[b.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=size * _ROUNDING[precision or a.dtype], equal_nan=True)


class Uses(TorchFunctionMode):
    """Records every tensor that is passed to a function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((args, kwargs))
        return func(*args, **(kwargs or {}))

    def note(self, values: Any) -> None:
        """Records the tensors in ``values``."""
        self._seen.update((id(t), t) for t in tensors_of(values))  # kept alive, so that no other tensor gets the same id

    def of(self, output: Any) -> tuple[bool, ...]:
        """Returns for each tensor of an output whether it was used."""
        return tuple(id(t) in self._seen for t in tensors_of(output))
