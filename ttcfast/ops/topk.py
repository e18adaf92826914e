"""Selects the k best scores of every row in a total order: larger first, ties by the smaller index or id, NaN last."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import define, native
from .arguments import dense
from .registry import Backend, Reason, cpu_device, register, yes

DTYPES = native.DTYPES
MOST_CUDA_K, MOST_CUDA_COLUMNS = 2048, 2**30  # kMostCudaK and kMostCudaColumns of csrc/topk.h


def topk(scores: Tensor, k: int, *, ids: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Return the ``k`` best scores of every row and their positions, best first.

    The order is total, so results do not depend on backend, device or number of threads: larger scores come first; of equal scores
    (-0 equals +0) the one with the smaller index, or the smaller id if ids are given; NaN comes after -inf. ``torch.topk``
    ranks NaN highest and breaks ties arbitrarily.

    Args:
        scores: ``[N, n]``, float32, float64, bfloat16 or float16, any strides.
        k: Number of scores to take from each row, 1 to n.
        ids: Identifiers of the scores, int64 ``[N, n]``, any strides and values; they break ties and are returned in place of the indices,
            as needed to merge a running top k with a new chunk. Among repeated ids, the smaller index comes first.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"``.

    Returns:
        ``values [N, k]``, the selected scores, and ``indices [N, k]`` int64, positions in the row, or the ids. The values are
        differentiable in the scores, any number of times and in forward mode; ``torch.func`` and ``torch.vmap`` evaluate the
        definition. ``torch.autocast`` has no effect.

        On the CPU, memory traffic is little more than one read of the rows, for any scores (sorted, tied, NaN), and extra memory is O(k)
        per thread. On CUDA nothing waits for the device, so a graph can capture the call; k above 2048 is sorted by torch.

    Raises:
        TypeError: ``scores`` or ``ids`` is not a tensor, or ``k`` is not an integer.
        ValueError: ``k`` is below 1 or above n, a shape or dtype is not supported, or scores and ids are on different devices.
        BackendError: The requested backend cannot run; the message says why.
    """
    dense(scores=scores)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k is {k!r}; give an integer, 1 to n")
    if ids is not None:
        dense(ids=ids)
    result: tuple[Tensor, Tensor] = define.invoke("topk", scores, k, ids, backend)
    return result


class Call(NamedTuple):
    scores: Tensor  # [N, n]
    k: int
    ids: Tensor | None  # int64 [N, n]

    def empty(self) -> tuple[Tensor, Tensor]:
        """Allocate values and indices."""
        values = self.scores.new_empty((self.scores.shape[0], self.k))
        return values, torch.empty_like(values, dtype=torch.int64)


def check(call: Call) -> None:
    """Check everything that the implementations rely on, so that wrong arguments raise instead of corrupting memory."""
    scores, k, ids = call
    if scores.dtype not in DTYPES:
        raise ValueError(f"scores are {scores.dtype}; give float32, float64, bfloat16 or float16")
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; give [N, n], one row per problem (scores[None] for a single one)")
    if k < 1:
        raise ValueError(f"k is {k}; give at least 1")
    if k > scores.shape[1]:
        raise ValueError(f"k is {k} and scores have shape {tuple(scores.shape)}, n = {scores.shape[1]} per row; give at most n")
    if ids is None:
        return
    if ids.dtype != torch.int64 or ids.shape != scores.shape:
        raise ValueError(
            f"ids are {ids.dtype} {tuple(ids.shape)}; give torch.int64 {tuple(scores.shape)}, the shape of scores "
            "(expand them if rows share ids)"
        )
    if ids.device != scores.device:
        raise ValueError(f"ids are on {ids.device} and scores on {scores.device}; give both on one device")


def topk_ref(call: Call) -> tuple[Tensor, Tensor]:
    """The definition: stable sorts, from the least to the most significant key. O(n log n)."""
    positions = best_positions(call)
    return call.scores.gather(1, positions), positions if call.ids is None else call.ids.gather(1, positions)


def best_positions(call: Call) -> Tensor:
    """Return the positions of the k best in each row, int64 ``[N, k]``."""
    scores, k, ids = call
    keys = [] if ids is None else [(ids, False)]
    keys += [(scores.nan_to_num(0.0, float("inf"), -float("inf")) + 0.0, True), (scores.isnan().to(torch.int8), False)]  # -0 + 0 is +0
    positions = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    for key, descending in keys:
        positions = positions.gather(1, key.gather(1, positions).sort(dim=1, descending=descending, stable=True).indices)
    return positions[:, :k].contiguous()


def _topk_cpu(call: Call) -> tuple[Tensor, Tensor]:
    out = call.empty()
    native.module().topk(*_native_arguments(call, out), *native.threads_and_level())
    return out


def _native_arguments(call: Call, out: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """Return the leading arguments of the C++ and CUDA paths, in the order of csrc/bind.cpp."""
    scores, k, ids = call
    named = (0, (0, 0)) if ids is None else (ids.data_ptr(), ids.stride())
    sizes = (*scores.shape, k)
    return native.code(scores.dtype), sizes, scores.data_ptr(), scores.stride(), *named, native.addresses(*out)


def _topk_cuda(call: Call) -> tuple[Tensor, Tensor]:
    from ttcfast.kernels.launch import COUNTERS

    out, device = call.empty(), call.scores.device
    with torch.cuda.device(device):
        zeroed_bytes, scratch_bytes = native.module().topk_cuda_workspaces(*call.scores.shape, call.k)
        zeroed = COUNTERS.get(zeroed_bytes // 4, device)
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        native.module().topk_cuda(*_native_arguments(call, out), zeroed.data_ptr(), scratch.data_ptr(), stream)
    return out


def _cuda_available() -> Reason:
    reason = native.available()
    if reason is not None:
        return reason
    if not native.device_info()["built_with_cuda"]:
        return "the extension was built without CUDA; reinstall with nvcc on PATH and TTCFAST_CUDA=ON"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _cuda_supports(call: Call) -> Reason:
    n, device = call.scores.shape[1], call.scores.device
    if device.type != "cuda":
        return f"scores are on {device}; the CUDA path reads the memory of a CUDA device"
    if call.k > MOST_CUDA_K:
        return f"k is {call.k}; the CUDA path sorts in shared memory and takes at most {MOST_CUDA_K}"
    if n >= MOST_CUDA_COLUMNS:
        return f"n is {n}; the CUDA path takes rows of fewer than {MOST_CUDA_COLUMNS}"
    return None


# The reference serves machines without the extension, and k above MOST_CUDA_K on a GPU.
BACKENDS = register(
    "topk",
    Backend("cpu", native.available, lambda call: cpu_device(call.scores), _topk_cpu),
    Backend("cuda", _cuda_available, _cuda_supports, _topk_cuda),
    Backend("reference", yes, yes, topk_ref),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, ctx.k, ids, _ = inputs
    ctx.shape = scores.shape
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*((output[1],) if ids is None else (scores, ids)))


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    # Ids do not reveal positions, so with ids the selection runs once more.
    saved = ctx.saved_tensors
    positions = saved[0] if len(saved) == 1 else best_positions(Call(saved[0], ctx.k, saved[1]))
    return grad.new_zeros(ctx.shape).scatter(1, positions, grad), None, None, None


define.define_call(
    "topk",
    Call,
    "(Tensor values, Tensor indices)",
    check=check,
    backends=BACKENDS,
    empty=Call.empty,
    definition=topk_ref,
    backward=_backward,
    setup_context=_setup,
)
