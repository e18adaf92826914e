"""The vector updates of Heun's and Euler's method and of their backward passes: one elementwise pass that also subtracts group means.

The definition is heun_ref in ttcfast/ops/heun.py.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .launch import ceil_div, submit


@lru_cache
def pick_config(shape):
    """Return groups per program and warps for ``shape = (groups, group)``, where ``group`` entries share a mean; 1 for no mean.

    Not from a timing sweep: no GPU was available when it was written (Nov 2026). 1024 entries per program are 8 per thread: two 16-byte
    loads per float32 tensor.
    """
    block = triton.next_power_of_2(shape[1])
    return max(1, 1024 // block), 4


@triton.jit
def heun_update_kernel(
    base,
    first,
    second,
    out,
    step: tl.float64,
    ratio: tl.float64,
    groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    CENTER: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS).to(tl.int64)  # [GROUPS]
    if CENTER:
        column = tl.arange(0, BLOCK)  # [BLOCK]
        at = row[:, None] * GROUP + column[None, :]
        inside = (row[:, None] < groups) & (column[None, :] < GROUP)
    else:
        at = row
        inside = row < groups
    slope = tl.load(first + at, mask=inside, other=0.0).to(ACC)
    if second is not None:
        slope += tl.full((), ratio, tl.float64).to(ACC) * tl.load(second + at, mask=inside, other=0.0).to(ACC)
    if CENTER:
        slope -= (tl.sum(slope, 1) / GROUP)[:, None]
    slope *= tl.full((), step, tl.float64).to(ACC)
    if base is not None:
        slope += tl.load(base + at, mask=inside, other=0.0).to(ACC)
    tl.store(out + at, slope, mask=inside)


def launch(base, first, second, step, ratio, group, out):
    """Fill ``out``. Tensors are contiguous and of one shape, ``base`` and ``second`` may be None. Checked by ttcfast/ops/heun.py."""
    count = first.numel()
    if count == 0:
        return
    width = max(group, 1)
    rows = count // width
    per_program, warps = pick_config((rows, width))
    submit(
        heun_update_kernel,
        ceil_div(rows, per_program),
        first.device,
        base,
        first,
        second,
        out,
        step,
        ratio,
        rows,
        GROUP=width,
        BLOCK=triton.next_power_of_2(width),
        GROUPS=per_program,
        CENTER=group > 0,
        ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
        num_warps=warps,
    )


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit)."""
    for name, base, first, second in (
        ("predict fp32", "*fp32", "*fp32", None),
        ("correct fp32", "*fp32", "*fp32", "*fp32"),
        ("correct fp32, bf16 slopes", "*fp32", "*bf16", "*bf16"),
        ("backward fp32", None, "*fp32", "*bf16"),
        ("correct fp64", "*fp64", "*fp64", "*fp64"),
    ):
        wide = first == "*fp64"
        out = "*fp64" if wide else "*fp32"
        for group in (0, 8):
            per_program, warps = pick_config((1 << 14, group or 1))
            signature = {"base": base, "first": first, "second": second, "out": out, "step": "fp64", "ratio": "fp64", "groups": "i32"}
            constants = {"GROUP": group or 1, "BLOCK": triton.next_power_of_2(group or 1), "GROUPS": per_program, "CENTER": group > 0}
            constants |= {"ACC": tl.float64 if wide else tl.float32}
            constants |= {k: None for k in ("base", "second") if signature[k] is None}
            signature = {k: v for k, v in signature.items() if v is not None}
            yield f"heun {name}, group {group}", heun_update_kernel, signature, constants, warps, 128
