"""Running sums and the squared norm of many tensors: one launch over a device table of pointers, then one program over the partial sums.

The definition is accumulate_moments_ref in ttcfast/ops/accumulate_moments.py. Squares are formed and added in float64: at 12 bytes of
memory traffic per element, even a GPU with one float64 unit per 64 lanes converts and adds several times faster than elements arrive.
The chunk size is fixed, so the order of every addition depends on the tensors' sizes alone.
"""

from collections import OrderedDict
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import capturing_on, ceil_div, submit

CHUNK = 8192  # elements per program
ROWS = tl.constexpr(4)  # of the table: address of the gradient, address of its total, number of elements, first chunk
MOST_TABLES = 32  # cached tables, evicted least recently used first; each takes 32 bytes per tensor

ELEMENTS = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache
def pick_config(grad, total):
    """Return the blocks and warps for gradients of dtype ``grad`` and totals of ``total``.

    Returns:
        (elements per step, tensors per step of the search, warps, partial sums per step of the second stage, its warps).

    Chosen from ``python -m bench.aot``, not from timings (no GPU was available, Nov 2026), between 1024 and 2048 elements. 2048 are two
    16-byte loads per thread and tensor in float32 and one in 16 bits, within 64 registers, so that four blocks of 256 threads keep 64 KiB
    in flight per multiprocessor (4 TB/s at a latency of 1 us need 30). float64 takes half. For 16-bit gradients with float32 totals, 2048
    would be converted from 8 to 4 elements per thread through shared memory and need up to 100 registers, hence 1024.
    """
    mixed = grad.itemsize != total.itemsize
    return 1024 if mixed or grad == torch.float64 else 2048, 256, 8, 1024, 8


@triton.jit
def _step(grad, total, inside, BLOCK: tl.constexpr, GRAD: tl.constexpr, TOTAL: tl.constexpr, ACCUMULATE: tl.constexpr, ZERO: tl.constexpr):
    """Return the squares of one block in float64. ``inside`` is None for full blocks, whose loads are then 16 bytes wide."""
    at = tl.arange(0, BLOCK)
    g = tl.load(grad + at, mask=inside, other=None if inside is None else 0.0)
    wide = g.to(tl.float64)
    if ACCUMULATE:
        old = tl.load(total + at, mask=inside)
        if TOTAL == tl.float64:  # noqa: SIM300
            tl.store(total + at, old + wide, mask=inside)
        else:
            tl.store(total + at, (old.to(tl.float32) + g.to(tl.float32)).to(TOTAL), mask=inside)
    if ZERO:
        tl.store(grad + at, tl.zeros([BLOCK], dtype=GRAD), mask=inside)
    return wide * wide


@triton.jit
def accumulate_moments_partial_kernel(
    table,  # int64 [ROWS, tensors]
    partials,  # float64 [chunks]
    tensors,
    GRAD: tl.constexpr,
    TOTAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ZERO: tl.constexpr,
    ALIGNED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCH: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    # This chunk's tensor: the last whose first chunk is not after it.
    lane = tl.arange(0, SEARCH)
    started = tl.zeros([SEARCH], dtype=tl.int32)
    for begin in range(0, tensors, SEARCH):
        first = tl.load(table + 3 * tensors + begin + lane, mask=begin + lane < tensors, other=0x7FFFFFFFFFFFFFFF)
        started += (first <= chunk).to(tl.int32)
    column = table + tl.sum(started) - 1
    grad = tl.load(column).to(tl.pointer_type(GRAD))
    total = tl.load(column + tensors).to(tl.pointer_type(TOTAL))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
        total = tl.multiple_of(total, 16)
    start = (chunk - tl.load(column + 3 * tensors)) * SIZE
    left = tl.load(column + 2 * tensors) - start

    squares = tl.zeros([BLOCK], dtype=tl.float64)
    for step in range(0, SIZE, BLOCK):
        here = start + step
        if step + BLOCK <= left:
            squares += _step(grad + here, total + here, None, BLOCK, GRAD, TOTAL, ACCUMULATE, ZERO)
        elif step < left:
            inside = step + tl.arange(0, BLOCK) < left
            squares += _step(grad + here, total + here, inside, BLOCK, GRAD, TOTAL, ACCUMULATE, ZERO)
    tl.store(partials + chunk, tl.sum(squares))


@triton.jit
def accumulate_moments_finish_kernel(partials, result, chunks, STEP: tl.constexpr):
    lane = tl.arange(0, STEP)
    sums = tl.zeros([STEP], dtype=tl.float64)
    for start in range(0, chunks, STEP):
        sums += tl.load(partials + start + lane, mask=start + lane < chunks, other=0.0)
    tl.store(result, tl.sum(sums))


class Table(NamedTuple):
    """What a set of tensors costs the host to find out."""

    rows: torch.Tensor | None  # int64 [ROWS, tensors that hold elements] on the device; None if none does
    chunks: int
    aligned: bool


class Tables:
    """Device tables cached by the addresses and sizes they are made of, so that tensors that stay where they are cost neither copies nor
    a pass over them. A tensor that has moved, by ``data_ptr``, makes a new table.

    A table is used only on the stream that created it. Tables captured by a CUDA graph are kept forever, since every replay reads them.
    If a capture meets new tensors (allocated from the graph's pool), their table is copied within the graph from pinned memory set aside
    by an earlier call, since a capture cannot allocate pinned memory.
    """

    def __init__(self):
        self.made = OrderedDict()
        self.spare = None  # pinned memory for the next capture
        self.kept = []

    def get(self, addresses, counts, device):
        """Return the table of tensors of ``counts`` elements; ``addresses`` are those of the totals, if any, then of the gradients."""
        capturing, stream = capturing_on(device)
        key = device, stream, addresses, counts
        table = self.made.get(key)
        if table is not None:
            self.made.move_to_end(key)
            if capturing:
                self.kept.append(table)
            return table
        rows, chunks = _rows(addresses, counts)
        put = (self._within_capture if capturing else self._outside)(rows, device) if chunks else None
        table = Table(put, chunks, all(address % 16 == 0 for address in addresses))
        if capturing:
            return table
        self.made[key] = table
        while len(self.made) > MOST_TABLES:
            self.made.popitem(last=False)
        return table

    def _outside(self, rows, device):
        table = torch.tensor(rows, dtype=torch.int64).to(device)  # from pageable memory, so the copy is complete on return, for any stream
        if device.type == "cuda" and (self.spare is None or self.spare.numel() < table.numel()):
            self.spare = torch.empty(table.numel(), dtype=torch.int64, pin_memory=True)
        return table

    def _within_capture(self, rows, device):
        numbers = ROWS.value * len(rows[0])
        if self.spare is None or self.spare.numel() < numbers:
            raise RuntimeError(
                f"accumulate_moments is captured in a CUDA graph with {len(rows[0])} tensors, more than any call before; "
                "call it once outside the capture with as many tensors (which also compiles the kernel)"
            )
        pinned, self.spare = self.spare, None
        self.kept.append(pinned)
        pinned[:numbers].copy_(torch.tensor(rows, dtype=torch.int64).flatten())
        return pinned[:numbers].to(device, non_blocking=True).reshape(ROWS.value, -1)


def _rows(addresses, counts):
    """Return the rows of the table and the number of chunks."""
    totals, grads, first, columns = addresses[: len(counts)], addresses[-len(counts) :], 0, []
    for g, t, count in zip(grads, totals, counts):
        if count:
            columns.append((g, t, count, first))
            first += ceil_div(count, CHUNK)
    return list(zip(*columns)), first


TABLES = Tables()


def launch(grads, totals, zero_grads, addresses):
    """Return the sum of squares, float64 ``[]``. ttcfast/ops/accumulate_moments.py has checked the arguments; ``addresses`` are those of
    the totals, then of the gradients."""
    device = grads[0].device
    rows, chunks, aligned = TABLES.get(tuple(addresses), tuple(map(torch.Tensor.numel, grads)), device)
    result = torch.empty((), dtype=torch.float64, device=device)
    if not chunks:
        return result.zero_()
    types = grads[0].dtype, (totals or grads)[0].dtype
    block, search, warps, step, finish_warps = pick_config(*types)
    partials = torch.empty(chunks, dtype=torch.float64, device=device)
    submit(
        accumulate_moments_partial_kernel,
        chunks,
        device,
        rows,
        partials,
        rows.shape[1],
        GRAD=ELEMENTS[types[0]],
        TOTAL=ELEMENTS[types[1]],
        ACCUMULATE=bool(totals),
        ZERO=zero_grads,
        ALIGNED=aligned,
        SIZE=CHUNK,
        BLOCK=block,
        SEARCH=search,
        num_warps=warps,
    )
    submit(accumulate_moments_finish_kernel, 1, device, partials, result, chunks, STEP=step, num_warps=finish_warps)
    return result


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit).

    Blocks have 256 threads; 64 registers let four of them share a multiprocessor, which keeps enough memory in flight.
    """
    signature = {"table": "*i64", "partials": "*fp64", "tensors": "i32"}
    pairs = [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ]
    kinds = {"": (True, False, True), ", zeroing": (True, True, True), ", unaligned, norm alone": (False, False, False)}
    for grad, total in pairs:
        block, search, warps, step, finish_warps = pick_config(grad, total)
        for kind, (accumulate, zero, aligned) in kinds.items():
            constants = {"GRAD": ELEMENTS[grad], "TOTAL": ELEMENTS[total], "ACCUMULATE": accumulate, "ZERO": zero, "ALIGNED": aligned}
            constants |= {"SIZE": CHUNK, "BLOCK": block, "SEARCH": search}
            name = f"accumulate_moments {ELEMENTS[grad]} to {ELEMENTS[total]}{kind}"
            yield name, accumulate_moments_partial_kernel, signature, constants, warps, 64
    signature = {"partials": "*fp64", "result": "*fp64", "chunks": "i32"}
    yield "accumulate_moments_finish", accumulate_moments_finish_kernel, signature, {"STEP": step}, finish_warps, 64
