"""Bias, LayerNorm and Mish of whole rows in registers, and their gradient, which recomputes Mish and the normalised rows.

The definition is norm_mish_ref in ttcfast/ops/norm_mish.py.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import ceil_div, submit

PROGRAMS = 264  # largest number of programs that store partial sums of the parameters' gradients: two per multiprocessor of an H100


@lru_cache
def pick_config(shape, wide=False):
    """Return rows per step of a program, block width and warps for ``shape = (rows, width)``; ``wide`` for float64.

    Not from a timing sweep: no GPU was available when it was written (Nov 2026). From ``python -m bench.aot``: 16 entries per thread spill
    in the backward pass, 8 (4 in float64) do not. Rows that need more than 4 warps at that get 4 entries per thread, with which the
    backward pass takes at most 64 registers where a row's width and start are multiples of 16, so two blocks share a multiprocessor.
    """
    block = triton.next_power_of_2(shape[1])
    entries = 512 if wide else 1024
    rows = max(1, entries // block)
    return rows, block, 4 if block <= entries else min(16, block // 128)


@triton.jit
def _gate(x):
    """Return mish(x) / x = n / (n + 2) with n = e^x (e^x + 2), and e^x and 1 / (n + 2), from which the slope is computed."""
    w = tl.exp(tl.minimum(x, 20.0))
    n = w * (w + 2)
    inverse = 1 / (n + 2)
    return n * inverse, w, inverse


@triton.jit
def _total(x, rows, bias, at, column, inside, within, ACC: tl.constexpr):
    total = tl.load(x + at, mask=inside, other=0.0).to(ACC) + tl.load(bias + column, mask=within, other=0.0)[None, :]
    if rows is not None:
        total += tl.load(rows + at, mask=inside, other=0.0)
    return total


@triton.jit
def norm_mish_kernel(
    x,
    rows,
    bias,
    scale,
    shift,
    y,
    stats,
    count,
    width,
    eps: tl.float64,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
    column = tl.arange(0, BLOCK)  # [BLOCK]
    within = column < width
    inside = (row[:, None] < count) & within[None, :]
    at = row[:, None] * width + column[None, :]
    total = _total(x, rows, bias, at, column, inside, within, ACC)
    mean = tl.sum(total, 1) / width
    offset = tl.where(inside, total - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(offset * offset, 1) / width + tl.full((), eps, tl.float64).to(ACC))
    weight = tl.load(scale + column, mask=within, other=0.0)[None, :]
    normal = offset * rstd[:, None] * weight + tl.load(shift + column, mask=within, other=0.0)[None, :]
    gate, _, _ = _gate(normal)
    tl.store(y + at, normal * gate, mask=inside)
    tl.store(stats + 2 * row, mean, mask=row < count)
    tl.store(stats + 2 * row + 1, rstd, mask=row < count)


@triton.jit
def norm_mish_backward_kernel(
    grad,
    x,
    rows,
    bias,
    scale,
    shift,
    stats,
    grad_x,
    y,
    partials,
    count,
    width,
    steps,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    within = column < width
    weight = tl.load(scale + column, mask=within, other=0.0)[None, :]
    level = tl.load(shift + column, mask=within, other=0.0)[None, :]
    if partials is not None:
        grad_scale = tl.zeros([BLOCK], dtype=ACC)
        grad_shift = tl.zeros([BLOCK], dtype=ACC)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
        inside = (row[:, None] < count) & within[None, :]
        at = row[:, None] * width + column[None, :]
        mean = tl.load(stats + 2 * row, mask=row < count, other=0.0)
        rstd = tl.load(stats + 2 * row + 1, mask=row < count, other=0.0)
        total = _total(x, rows, bias, at, column, inside, within, ACC)
        hat = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
        normal = hat * weight + level
        gate, w, inverse = _gate(normal)
        if y is not None:
            tl.store(y + at, normal * gate, mask=inside)
        slope = gate + normal * (4 * w * (w + 1) * inverse * inverse)
        inner = tl.load(grad + at, mask=inside, other=0.0).to(ACC) * slope
        if partials is not None:
            grad_scale += tl.sum(inner * hat, 0)
            grad_shift += tl.sum(inner, 0)
        outer = inner * weight
        along = tl.sum(outer * hat, 1) / width
        result = rstd[:, None] * (outer - (tl.sum(outer, 1) / width)[:, None] - hat * along[:, None])
        tl.store(grad_x + at, result, mask=inside)
    if partials is not None:
        into = partials + program * 2 * width + column
        tl.store(into, grad_scale, mask=within)
        tl.store(into + width, grad_shift, mask=within)


def _config(x, scale):
    width = x.shape[-1]
    count = x.numel() // width
    wide = scale.dtype == torch.float64
    return count, width, tl.float64 if wide else tl.float32, pick_config((count, width), wide)


def launch(x, rows, bias, scale, shift, eps, y, stats):
    """Fill ``y`` and ``stats``. All contiguous; checked by ttcfast/ops/norm_mish.py."""
    count, width, acc, (per_step, block, warps) = _config(x, scale)
    if count == 0:
        return
    submit(
        norm_mish_kernel,
        ceil_div(count, per_step),
        x.device,
        x,
        rows,
        bias,
        scale,
        shift,
        y,
        stats,
        count,
        width,
        eps,
        ACC=acc,
        ROWS=per_step,
        BLOCK=block,
        num_warps=warps,
    )


def launch_backward(grad, x, rows, bias, scale, shift, stats, grad_x, y, grad_scale, grad_shift):
    """Fill ``grad_x`` and, where they are not None, ``y``, ``grad_scale`` and ``grad_shift`` (both or neither)."""
    count, width, acc, (per_step, block, warps) = _config(x, scale)
    parameters = grad_scale is not None
    if count == 0:
        if parameters:
            grad_scale.zero_()
            grad_shift.zero_()
        return
    groups = ceil_div(count, per_step)
    steps = ceil_div(groups, PROGRAMS) if parameters else 1
    programs = ceil_div(groups, steps)
    partials = scale.new_empty((programs, 2, width)) if parameters else None
    submit(
        norm_mish_backward_kernel,
        programs,
        x.device,
        grad,
        x,
        rows,
        bias,
        scale,
        shift,
        stats,
        grad_x,
        y,
        partials,
        count,
        width,
        steps,
        ACC=acc,
        ROWS=per_step,
        BLOCK=block,
        num_warps=warps,
    )
    if parameters:
        torch.sum(partials[:, 0], 0, out=grad_scale)
        torch.sum(partials[:, 1], 0, out=grad_shift)


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit)."""
    for stored, acc in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        for width, aligned in ((512, ":16"), (1792, ":16"), (1792, "")) if acc == "fp32" else ((512, ":16"), (512, "")):
            per_step, block, warps = pick_config((4096, width), acc == "fp64")
            limit = 65536 // (2 * 32 * warps) if aligned else 128  # two blocks per multiprocessor
            constants = {"ACC": tl.float64 if acc == "fp64" else tl.float32, "ROWS": per_step, "BLOCK": block}
            shared = dict.fromkeys(("rows", "bias", "scale", "shift", "stats"), f"*{acc}{aligned}")
            shared |= {**dict.fromkeys(("x", "y"), f"*{stored}{aligned}"), "count": "i32", "width": "i32" + aligned}
            name = f"{stored} {width}{'' if aligned else ' unaligned'}"
            yield f"norm_mish {name}", norm_mish_kernel, {**shared, "eps": "fp64"}, constants, warps, min(limit, 128)
            signature = {**shared, "partials": f"*{acc}{aligned}", "steps": "i32"}
            signature |= dict.fromkeys(("grad", "grad_x"), f"*{stored}{aligned}")
            for kind, absent in (("trained", {}), ("frozen", {"y": None, "partials": None})):
                rest = {k: v for k, v in signature.items() if k not in absent}
                yield f"norm_mish_backward {name} {kind}", norm_mish_backward_kernel, rest, {**constants, **absent}, warps, min(limit, 128)
