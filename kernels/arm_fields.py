"""The analytical reward of declared fields: partial sums per (problem, candidate, tile), then each candidate's results from its partials.

The definition is arm_fields_ref in ttcfast/ops/arm_fields_ref.py. As in arm.py, every sum is a tree whose shape depends only on the number
of cells and the dtype, nothing waits for the device and no launch depends on data. Bounds, what is anchored, groups, weights and distances
lie in a table on the device; numbers of channels, quantities, vector fields and dimensions and which axes wrap are compiled in.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import launch as launching
from .fold import fold, totals
from .launch import ceil_div, submit

CELLS_A_THREAD = {2: 4, 4: 4, 8: 2}  # by bytes of a stored value; every cell needs its own address, and eight would spill registers
MOST_FOLDED = 64  # tiles of a candidate whose last program finishes it, as in arm.py; beyond, a second launch does
MOST_ROWS = 512  # partials that stage 2 reads per step
BEYOND = tl.constexpr(4)  # slots of a partial after the channels: boundary error, out of bounds, divergence, not finite
COLUMNS = tl.constexpr(4)  # of the table: low, high, anchored, group


@triton.jit
def _neighbour(i, step, size, WRAPS: tl.constexpr):
    """Return the index of the next cell along an axis, and whether it exists."""
    there = i + step
    inside = (there >= 0) & (there < size)
    if WRAPS:
        there = tl.where(there < 0, there + size, tl.where(there >= size, there - size, there))
        inside = there >= 0
    return there, inside


@triton.jit
def _finish(
    at,
    n,
    partials,
    table,
    mask_count,
    expected,
    units,
    score,
    penalties,
    finite,
    cells,
    tiles,
    inner,
    unit,
    C: tl.constexpr,
    QUANTITIES: tl.constexpr,
    MODE: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write the results of candidate number ``at`` of problem ``n`` from its partials."""
    slot = tl.arange(0, SLOTS)
    sums = totals(partials + at * tiles * SLOTS, tiles, slot, slot < SLOTS, SLOTS, STEP, 1)
    residual = tl.full((), unit, tl.float64) * sums
    if expected is not None:
        residual -= tl.load(expected + n * C + slot, mask=slot < C, other=0.0)
    group = tl.load(table + slot * COLUMNS + 3, mask=slot < C, other=-1.0)
    good = tl.sum(tl.where(slot == C + 3, sums, 0.0)) == 0
    total = tl.zeros((), dtype=tl.float64)
    for k in tl.static_range(QUANTITIES + 3):
        if k < QUANTITIES:
            own = tl.where(group == k, residual, 0.0)
            if MODE == 0:
                penalty = tl.abs(tl.sum(own))
            elif MODE == 1:
                penalty = tl.sum(tl.abs(own))
            else:
                penalty = tl.sqrt(tl.sum(own * own))
            if units is not None:
                penalty = penalty / tl.load(units + n * (QUANTITIES + 1) + k)
        else:
            penalty = tl.sum(tl.where(slot == C + k - QUANTITIES, sums, 0.0))
            if k == QUANTITIES:
                if mask_count is not None:
                    penalty = penalty / (tl.maximum(tl.load(mask_count), 1) * C)
            elif k == QUANTITIES + 1:
                penalty = penalty / cells
            elif units is not None:
                penalty = penalty / tl.load(units + n * (QUANTITIES + 1) + QUANTITIES)
            else:
                penalty = penalty / inner
        penalty = tl.where(good & (penalty == penalty), penalty, float("inf"))
        total += tl.load(table + C * COLUMNS + k) * penalty
        tl.store(penalties + at * (QUANTITIES + 3) + k, penalty)
    tl.store(score + at, tl.where(tl.abs(total) < float("inf"), -total, float("-inf")))
    tl.store(finite + at, good)


@triton.jit
def arm_fields_partial_kernel(
    state,
    cand,
    volumes,
    mask,
    values,
    table,
    partials,
    arrived,  # None: the second stage is a kernel of its own, and gets the arguments from here to `finite`
    mask_count,
    expected,
    units,
    score,
    penalties,
    finite,
    B,
    cells,
    e0,
    e1,
    e2,
    tiles,
    state_n,
    state_c,
    state_0,
    state_1,
    state_2,
    cand_n,
    cand_b,
    cand_c,
    cand_0,
    cand_1,
    cand_2,
    value: tl.float64,
    inner: tl.float64,
    unit: tl.float64,
    C: tl.constexpr,
    QUANTITIES: tl.constexpr,
    MODE: tl.constexpr,
    FIELDS: tl.constexpr,
    DIMENSIONS: tl.constexpr,
    WRAPS_0: tl.constexpr,
    WRAPS_1: tl.constexpr,
    WRAPS_2: tl.constexpr,
    VECTORS: tl.constexpr,
    SLOTS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
    STEP: tl.constexpr,
):
    # tl.cast, since a stride of 1 arrives as a constexpr; an int32 product would overflow.
    state_c, cand_c, channel_cells = tl.cast(state_c, tl.int64), tl.cast(cand_c, tl.int64), tl.cast(cells, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    b = program // tiles % B
    n = program // tiles // B
    cell = tile * TILE + tl.arange(0, TILE)
    inside = cell < cells
    i0, i1, i2 = cell // e2 // e1, cell // e2 % e1, cell % e2
    old_at = state + n * state_n + i0 * state_0 + i1 * state_1 + i2 * state_2
    base = cand + n * cand_n + b * cand_b
    new_at = base + i0 * cand_0 + i1 * cand_1 + i2 * cand_2
    into = partials + ((n * B + b) * tiles + tile) * SLOTS
    zero = tl.zeros([TILE], dtype=ACC)
    away, outside, bad = zero, zero, zero
    if volumes is not None:
        volume = tl.load(volumes + cell, mask=inside, other=0.0)
    else:
        volume = zero + 1
    if mask is not None:
        masked = tl.load(mask + cell, mask=inside, other=0).to(tl.int32) != 0
    prescribed = tl.full([TILE], value, tl.float64).to(ACC)
    for c in tl.static_range(C):
        x = tl.load(new_at + c * cand_c, mask=inside, other=0.0).to(ACC)
        old = tl.load(old_at + c * state_c, mask=inside, other=0.0).to(ACC)
        low = tl.load(table + c * COLUMNS).to(ACC)
        high = tl.load(table + c * COLUMNS + 1).to(ACC)
        anchored = tl.load(table + c * COLUMNS + 2) != 0
        bad = tl.where(tl.abs(x) < float("inf"), bad, 1.0)
        below = tl.where(x < low, low - x, 0.0)
        above = tl.where(x > high, x - high, 0.0)
        outside += tl.where(inside, below + above, 0.0)
        tl.store(into + c, tl.sum(fold(volume * (x - tl.where(anchored, old, 0.0)), TILE, 1, VECTOR, THREADS)))
        if mask is not None:
            if values is not None:
                prescribed = tl.load(values + c * channel_cells + cell, mask=inside & masked, other=0.0)
            away += tl.where(masked, tl.abs(x - prescribed), 0.0)
    rough = zero
    for f in tl.static_range(FIELDS):
        total, whole = zero, inside
        for k in tl.static_range(DIMENSIONS):
            channel = tl.load(table + VECTORS + f * DIMENSIONS + k).to(tl.int64)
            scale = tl.load(table + VECTORS + FIELDS * DIMENSIONS + k).to(ACC)
            at = base + channel * cand_c
            if 3 - DIMENSIONS + k == 0:  # the axis of component k
                after, has_after = _neighbour(i0, 1, e0, WRAPS_0)
                before, has_before = _neighbour(i0, -1, e0, WRAPS_0)
                rest, step = i1 * cand_1 + i2 * cand_2, cand_0
            elif 3 - DIMENSIONS + k == 1:
                after, has_after = _neighbour(i1, 1, e1, WRAPS_1)
                before, has_before = _neighbour(i1, -1, e1, WRAPS_1)
                rest, step = i0 * cand_0 + i2 * cand_2, cand_1
            else:
                after, has_after = _neighbour(i2, 1, e2, WRAPS_2)
                before, has_before = _neighbour(i2, -1, e2, WRAPS_2)
                rest, step = i0 * cand_0 + i1 * cand_1, cand_2
            whole = whole & has_after & has_before
            ahead = tl.load(at + rest + after * step, mask=inside & has_after, other=0.0).to(ACC)
            behind = tl.load(at + rest + before * step, mask=inside & has_before, other=0.0).to(ACC)
            total += (ahead - behind) * scale
        rough += tl.where(whole, tl.abs(total), 0.0)
    tl.store(into + C, tl.sum(fold(away, TILE, 1, VECTOR, THREADS)))
    tl.store(into + C + 1, tl.sum(fold(outside, TILE, 1, VECTOR, THREADS)))
    tl.store(into + C + 2, tl.sum(fold(rough, TILE, 1, VECTOR, THREADS)))
    tl.store(into + C + 3, tl.max(bad))

    if arrived is not None:
        at = n * B + b
        tl.debug_barrier()  # all of this program's sums are written before it says so
        if tl.atomic_add(arrived + at, 1, sem="acq_rel") == tiles - 1:
            tl.store(arrived + at, 0)  # for the next launch
            _finish(
                at,
                n,
                partials,
                table,
                mask_count,
                expected,
                units,
                score,
                penalties,
                finite,
                cells,
                tiles,
                inner,
                unit,
                C,
                QUANTITIES,
                MODE,
                SLOTS,
                STEP,
            )


@triton.jit
def arm_fields_finish_kernel(
    partials,
    table,
    mask_count,
    expected,
    units,
    score,
    penalties,
    finite,
    B,
    cells,
    tiles,
    inner: tl.float64,
    unit: tl.float64,
    C: tl.constexpr,
    QUANTITIES: tl.constexpr,
    MODE: tl.constexpr,
    SLOTS: tl.constexpr,
    STEP: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    _finish(
        at,
        at // B,
        partials,
        table,
        mask_count,
        expected,
        units,
        score,
        penalties,
        finite,
        cells,
        tiles,
        inner,
        unit,
        C,
        QUANTITIES,
        MODE,
        SLOTS,
        STEP,
    )


@lru_cache(maxsize=64)
def _table(low, high, anchored, groups, weights, vectors, distances, device):
    """Return a declaration's tables: per channel low, high, anchored and group; weights; channels of vectors; 1 / (2 distance)."""
    per_channel = [x for channel in zip(low, high, anchored, groups) for x in channel]
    numbers = [*per_channel, *weights, *vectors, *(0.5 / h for h in distances)]
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def launch(call, out, volumes, mask, values, expected, units, *, mode):
    """Fill ``out``: score ``[N, B]``, penalties ``[N, B, quantities + 3]`` and finite ``[N, B]``.

    ``call`` is the record that ttcfast/ops/arm_fields.py has checked; volumes, mask and values are contiguous, the first and the last in
    the accumulation dtype; ``expected [N, C]`` and ``units [N, quantities + 1]`` are float64. All may be None.
    """
    state, candidates = call.state, call.candidates
    n, b, channels = candidates.shape[:3]
    if n == 0:
        return
    pad = 5 - state.ndim
    extents = [1] * pad + list(state.shape[2:])
    wraps = [True] * pad + [bool(p) for p in call.periodic]
    cells = extents[0] * extents[1] * extents[2]
    wide = state.dtype == torch.float64
    tile, threads, vector = _tile(cells, state.element_size())
    tiles, slots = ceil_div(cells, tile), triton.next_power_of_2(channels + BEYOND.value)
    partials = torch.empty((n, b, tiles, slots), dtype=torch.float64 if wide else torch.float32, device=state.device)
    lists = (call.low, call.high, call.anchored, call.groups, call.weights, call.vectors, call.distances)
    table = _table(*map(tuple, lists), state.device)
    step = min(MOST_ROWS, max(4, triton.next_power_of_2(tiles)))
    common = {"C": channels, "QUANTITIES": call.quantities, "MODE": mode, "SLOTS": slots, "STEP": max(4, step * 8 // max(slots, 8))}
    results = None if mask is None else mask.sum(dtype=torch.float64), expected, units, *out
    scales = float(max(call.fields * call.inner_cells, 1)), 1.0 if volumes is not None else call.volume
    folded = tiles <= MOST_FOLDED
    submit(
        arm_fields_partial_kernel,
        n * b * tiles,
        state.device,
        state,
        candidates,
        volumes,
        mask,
        values,
        table,
        partials,
        *((launching.COUNTERS.get(n * b, state.device), *results) if folded else [None] * 7),
        b,
        cells,
        *extents,
        tiles,
        *state.stride()[:2],
        *([0] * pad + list(state.stride()[2:])),
        *candidates.stride()[:3],
        *([0] * pad + list(candidates.stride()[3:])),
        call.value,
        *scales,
        FIELDS=call.fields,
        DIMENSIONS=len(call.distances),
        WRAPS_0=wraps[0],
        WRAPS_1=wraps[1],
        WRAPS_2=wraps[2],
        VECTORS=channels * COLUMNS.value + len(call.weights),
        ACC=tl.float64 if wide else tl.float32,
        TILE=tile,
        VECTOR=vector,
        THREADS=threads,
        num_warps=1,
        **common,
    )
    if not folded:
        submit(arm_fields_finish_kernel, n * b, state.device, partials, table, *results, b, cells, tiles, *scales, num_warps=1, **common)


@lru_cache
def _tile(cells, element):
    """Return cells per tile, threads over which its tree distributes them, and neighbours that it adds first."""
    per_thread = CELLS_A_THREAD[element]
    tile = min(per_thread * 32, max(16, triton.next_power_of_2(cells)))
    return tile, max(1, tile // per_thread), min(16 // element, per_thread)


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit). Nothing may spill."""
    for stored, element in (("fp32", 4), ("bf16", 2), ("fp64", 8)):
        acc = "fp64" if stored == "fp64" else "fp32"
        tile, threads, vector = _tile(65536, element)
        for name, fields, channels in (("one channel", 0, 1), ("vector field and parameters", 1, 4)):
            pointers = {"state": f"*{stored}:16", "cand": f"*{stored}:16", "table": "*fp64:16", "partials": f"*{acc}:16"}
            optional = {"volumes": f"*{acc}:16", "mask": "*i1:16", "values": f"*{acc}:16"}
            strides = [f"{x}_{k}" for x in ("state", "cand") for k in "n012"] + ["state_c", "cand_b", "cand_c"]
            sizes = ("B", "cells", "e0", "e1", "e2", "tiles", *strides)
            signature = {**pointers, **(optional if fields else {}), **dict.fromkeys(sizes, "i32"), "inner": "fp64", "unit": "fp64"}
            results = {"mask_count": "*fp64", "expected": "*fp64", "units": "*fp64"}
            results |= {"score": f"*{acc}", "penalties": f"*{acc}", "finite": "*i1"}
            constants = {**({} if fields else dict.fromkeys(optional)), "C": channels, "FIELDS": fields, "DIMENSIONS": 2}
            constants |= {"QUANTITIES": 1 + fields, "MODE": 2, "STEP": 64}
            constants |= {"WRAPS_0": True, "WRAPS_1": True, "WRAPS_2": not fields, "VECTORS": 4 * channels + 5, "SLOTS": 8}
            constants |= {"ACC": tl.float64 if acc == "fp64" else tl.float32, "TILE": tile, "VECTOR": vector, "THREADS": threads}
            signature |= {"value": "fp64"}
            absent = constants | dict.fromkeys(("arrived", *results))
            yield f"arm_fields_partial {stored} {name}", arm_fields_partial_kernel, signature, absent, 1, 168
            signature |= {"arrived": "*i32", **results}
            yield f"arm_fields_partial {stored} {name} in one launch", arm_fields_partial_kernel, signature, constants, 1, 168
        signature = {"partials": f"*{acc}:16", "table": "*fp64:16", "score": f"*{acc}", "penalties": f"*{acc}", "finite": "*i1"}
        signature |= {"mask_count": "*fp64", "expected": "*fp64", "units": "*fp64", **dict.fromkeys(("B", "cells", "tiles"), "i32")}
        signature |= {"inner": "fp64", "unit": "fp64"}
        constants = {"C": 4, "QUANTITIES": 2, "MODE": 2, "SLOTS": 8, "STEP": 256}
        if stored != "bf16":
            yield f"arm_fields_finish {stored}", arm_fields_finish_kernel, signature, constants, 1, 255
