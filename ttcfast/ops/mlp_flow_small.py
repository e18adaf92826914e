"""Calls the C++ loop over the steps of a small velocity MLP, in which one call makes all products as well."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import native
from .mlp_flow_loop import NOTHING, TRAINED, Call, Kept, Result, buffers

WIDEST = 256  # layers beyond which torch's matrix products, which know the processor's caches, are the faster ones
METHODS = ("heun", "euler", "map")  # positions are the codes of Method in csrc/mlp_flow.h


def is_small(call: Call) -> bool:
    """Tell whether the C++ loop takes the call."""
    return call.z.numel() > 0 and not call.half and max(call.z.shape[-1], *(w.shape[-2] for w in call.weights)) <= WIDEST


def forward(call: Call) -> tuple[Tensor, list[Tensor]]:
    """Return the result, and what is kept for the backward pass."""
    kept = buffers(call).flat() if call.keep != NOTHING else []
    result = call.empty()
    native.module().mlp_flow(problem(call, kept), result.data_ptr())
    return result, kept


def backward(call: Call, grad: Tensor, kept: Kept) -> Result:
    """Return the gradients from ``grad``, contiguous and shaped like the result."""
    of_z, none = call.z.new_empty(call.z.shape), call.z.new_empty(0)
    of_rows = none if call.rows is None else call.rows.new_empty(call.rows.shape)
    parameters = like(call) if call.keep == TRAINED else []
    out = native.addresses(of_z, None if call.rows is None else of_rows, *parameters)
    native.module().mlp_flow_backward(problem(call, kept.flat()), grad.data_ptr(), out)
    if not parameters:
        return Result(of_z, of_rows, none, [], [], [], [])
    n, (of_times, *rest) = len(call.scales), parameters
    return Result(of_z, of_rows, of_times, rest[: n + 1], rest[n + 1 : 2 * n + 1], rest[2 * n + 1 : 3 * n + 1], rest[3 * n + 1 :])


def like(call: Call) -> list[Tensor]:
    """Allocate a contiguous tensor for the gradient of each parameter."""
    return [t.new_empty(t.shape) for t in (call.times, *call.weights, *call.biases, *call.scales, *call.shifts)]


def problem(call: Call, kept: list[Tensor], steps: int | None = None) -> Any:
    """Return the call as the extension's ``MlpFlow``, which holds addresses: the tensors must outlive it. ``steps`` replaces its own."""
    z, stacked = call.z, call.stacked
    sizes = [z.shape[0] if stacked else 1, z.shape[-2], steps or call.steps or 1]
    sizes += [call.substeps, call.group, METHODS.index(call.method)]
    widths = [z.shape[-1], *(w.shape[-2] for w in call.weights)]
    strides = [w.stride() if stacked else (0, *w.stride()) for w in call.weights]
    given = native.addresses(z, call.rows, call.times, *call.weights, *call.biases, *call.scales, *call.shifts)
    return native.module().mlp_flow_problem(
        native.code(z.dtype), sizes, call.eps, widths, strides, given, native.addresses(*kept), *native.threads_and_level()
    )
