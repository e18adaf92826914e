"""Calls the C++ loop over the steps of a small velocity MLP, in which one call makes all products as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor

from . import native
from .mlp_flow_loop import TRAINED, Call

WIDEST = 256  # layers beyond which torch's matrix products, which know the processor's caches, are the faster ones
METHODS = ("heun", "euler", "map")  # positions are the codes of Method in csrc/mlp_flow.h


def is_small(call: Call) -> bool:
    """Tell whether the C++ loop takes the call."""
    return call.z.numel() > 0 and not call.half and max(call.z.shape[-1], *(w.shape[-2] for w in call.weights)) <= WIDEST


class Held(NamedTuple):
    """A call for the extension, with the memory of what it keeps for the backward pass: what Kept holds, one after another."""

    problem: Any
    memory: Any
    kept: list[int]  # addresses in it
    given: list[int]  # addresses of the call's tensors

    def again(self, tensors: Sequence[Tensor | None], call: Callable[[], Call], steps: int | None = None) -> Any:
        """Return the problem in the backward pass, where the call's tensors may lie elsewhere: hooks that save tensors return copies.

        ``tensors`` are those of ``call()`` one after another, as in :func:`addresses`.
        """
        return self.problem if native.addresses(*tensors) == self.given else problem(call(), self.kept, steps)


def hold(call: Call, steps: int | None = None) -> Held:
    """Allocate memory for the backward pass; ``steps`` replaces the call's own."""
    z, widths = call.z, [s.shape[-1] for s in call.scales]
    sizes = [*widths, *[2] * len(widths), *([z.shape[-1]] if call.keep == TRAINED else [])]
    lead = (steps or call.evaluations) * z.shape[:-1].numel() * z.element_size()
    memory = native.module().Memory(lead * sum(sizes))
    first = memory.address()
    kept, given = [first + lead * before for before in accumulate([0, *sizes[:-1]])], addresses(call)
    return Held(problem(call, kept, steps, given), memory, kept, given)


def forward(call: Call, problem: Any) -> Tensor:
    """Return the result, and keep what ``problem`` says."""
    result = call.empty()
    native.module().mlp_flow(problem, result.data_ptr())
    return result


def backward(problem: Any, grad: Tensor, tensors: Sequence[Tensor | None], keep: int) -> list[Tensor | None]:
    """Return the gradients of the call's tensors, None for those unwanted, from ``grad``, contiguous and shaped like the result."""
    some = tensors if keep == TRAINED else tensors[:2]
    found = [None if t is None else t.new_empty(t.shape) for t in some]
    native.module().mlp_flow_backward(problem, grad.data_ptr(), native.addresses(*found))
    return [*found, *[None] * (len(tensors) - len(some))]


def problem(call: Call, kept: list[int], steps: int | None = None, given: list[int] | None = None) -> Any:
    """Return the call as the extension's ``MlpFlow``, which holds addresses: the tensors must outlive it.

    ``steps`` replaces the call's own; ``given`` are its :func:`addresses`, if they are known.
    """
    z, stacked = call.z, call.stacked
    sizes = [z.shape[0] if stacked else 1, z.shape[-2], steps or call.steps or 1]
    sizes += [call.substeps, call.group, METHODS.index(call.method)]
    widths = [z.shape[-1], *(w.shape[-2] for w in call.weights)]
    strides = [w.stride() if stacked else (0, *w.stride()) for w in call.weights]
    skips = [t.stride(0) if stacked else 0 for t in (call.times, *call.biases, *call.scales, *call.shifts)]
    return native.module().mlp_flow_problem(
        native.code(z.dtype), sizes, call.eps, widths, strides, skips, given or addresses(call), kept, *native.threads_and_level()
    )


def addresses(call: Call) -> list[int]:
    """Return the addresses of the call's tensors, one by one."""
    return native.addresses(call.z, call.rows, call.times, *call.weights, *call.biases, *call.scales, *call.shifts)
