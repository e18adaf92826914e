"""Sums in a fixed order: pairwise trees whose bits do not depend on how the compiler distributes a tile over threads.

``tl.sum`` over a whole tile adds in an order that follows the layout, and hence the alignment of the pointers: a slice of the same
candidates would differ in the last digits.
"""

import triton
import triton.language as tl


@triton.jit
def fold(x, TILE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, THREADS: tl.constexpr):
    """Return the column sums ``[WIDTH]`` of ``x [TILE, WIDTH]``, added pairwise in a fixed order.

    Adds within a thread of the contiguous layout first (the neighbours of one load, then its loads), then across neighbouring threads, so
    no shared memory is needed while ``TILE`` fits a warp.
    """
    x = tl.reshape(x, [TILE, WIDTH])
    for k in tl.static_range(16):
        if TILE >> k > 1:
            if (1 << k) >= VECTOR and TILE >> k > THREADS:
                x = tl.sum(tl.reshape(x, [2, TILE >> (k + 1), WIDTH]), 0)  # the second half added to the first
            else:
                x = tl.sum(tl.reshape(x, [TILE >> (k + 1), 2, WIDTH]), 1)  # neighbours added
    return tl.reshape(x, [WIDTH])


@triton.jit
def totals(at, rows, columns, inside, STRIDE: tl.constexpr, STEP: tl.constexpr, UNROLL: tl.constexpr):
    """Return column sums over ``rows`` rows, ``STRIDE`` apart, in float64: steps in order, then a tree.

    ``columns`` are the columns' offsets within a row, ``inside`` tells which of them exist. ``UNROLL`` steps are loaded before the first
    is added; it changes no bit.
    """
    WIDTH: tl.constexpr = columns.shape[0]
    row = tl.arange(0, STEP)
    place = row[:, None] * STRIDE + columns[None, :]  # [STEP, WIDTH]
    total = tl.zeros([STEP, WIDTH], dtype=tl.float64)
    for start in tl.range(0, rows, STEP, loop_unroll_factor=UNROLL):
        # Past the nearest cache, which may hold what was there before another block wrote it.
        total += tl.load(at + place, mask=(start + row < rows)[:, None] & inside[None, :], other=0.0, cache_modifier=".cg").to(tl.float64)
        at += STEP * STRIDE
    return fold(total, STEP, WIDTH, 1, 1)
