"""The analytical reward in two stages: partial sums per (problem, candidate, tile), then the results of each candidate from its partials.

The definition is arm_ref in ttcfast/ops/arm_ref.py, the kernels are in arm_stages.py. Up to ``MOST_FOLDED`` tiles, the last program of a
group of candidates to arrive does the second stage for the group, in the one launch; beyond, and with volumes or masks of cells, with which
some GPUs' compilers would run out of registers, a second launch has a program per candidate.
Every sum is a tree whose shape depends only on the number of cells and the dtype (fold.py), so results are bitwise equal for any B, any
split of it, any strides, and from run to run. Nothing waits for the device and no launch depends on data, so a CUDA graph can capture it.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch as launching
from .arm_stages import SLOTS, arm_finish_kernel, arm_partial_kernel
from .launch import capability, ceil_div, is_contiguous, submit


class Config(NamedTuple):
    """Launch parameters. Results depend on the first three and ``step``, which follow from cells and dtype alone; the rest is free."""

    tile: int  # cells per program of stage 1
    vector: int  # neighbouring cells of a 16-byte load, which the tree adds first
    threads: int  # threads over which the tree distributes a tile
    warps: int
    group: int  # candidates per program; they share the state, which stays in registers
    step: int  # partials that stage 2 reads per step
    finish_warps: int  # of a second launch


# Chosen from registers and PTX (``python -m bench.aot``), not from timings: no GPU was available (Nov 2026), so one row serves every
# capability. Eight cells per thread are two 16-byte loads per channel in float32 and one in bfloat16; with sixteen the state alone would
# take 64 registers; float64 takes four. A block is one warp, so its sums are shuffles without a barrier (tiles of four warps took 20 to
# 50 registers more). At 128 registers sixteen warps fit a multiprocessor: 512 threads with eight 16-byte loads each, twice the 26 KB in
# flight that hide the memory's latency. Strided fields need an address per cell, hence half as many cells per thread.
CELLS_A_THREAD = {2: 8, 4: 8, 8: 4}  # by bytes of a stored value
MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148}
WAVES = 4  # minimum programs per multiprocessor before candidates share one
MOST_SHARING = 8  # candidates that share a state tile, each with an eighth of its loads
# A warp reads the partials of eight candidates and 64 tiles, 16 KB, in two rounds of the memory's latency, about what a launch takes.
# With 1024 tiles it would be 32 rounds, which no other program's work hides in the last group.
MOST_FOLDED = 64
FOLDED_ROWS = {2: 8, 4: 8, 8: 4}  # partials per step then: for eight candidates, 16 numbers per thread, 8 if they are float64
MOST_ROWS = 512  # partials per step of a second launch: few steps for any grid, sixteen numbers per thread


@lru_cache
def pick_config(shape, capability, element=4, contiguous=True):
    """Return launch parameters for ``shape = (N, B, C, cells)`` and a compute capability; ``element`` is the value size in bytes."""
    n, candidates, _, cells = shape
    per_thread = CELLS_A_THREAD[element]
    tile = min(per_thread * 32, max(16, triton.next_power_of_2(cells)))
    tiles = ceil_div(cells, tile)
    wanted = WAVES * MULTIPROCESSORS.get(capability, MULTIPROCESSORS[9, 0])
    group = MOST_SHARING
    while group > 1 and (group >= 2 * candidates or n * tiles * ceil_div(candidates, group) < wanted):
        group //= 2
    step = FOLDED_ROWS[element] if tiles <= MOST_FOLDED else min(MOST_ROWS, triton.next_power_of_2(tiles))
    return Config(tile, 16 // element, max(1, tile // per_thread), 1 if contiguous else 2, group, step, max(1, step // 64))


def _grid(x, lead):
    """Return three space sizes, three space strides, and whether the cells are contiguous."""
    pad = 3 + lead - x.ndim
    sizes, strides = [1] * pad + list(x.shape[lead:]), [0] * pad + list(x.stride()[lead:])
    return sizes, strides, is_contiguous(sizes, strides)


def launch(call, out, volumes, mask, values, *, mode, relative):
    """Fill ``out``: score, five penalties ``[N, B]``, finite ``[N, B]``, residuals ``[N, B, components + 2]``.

    ``call`` is the record of arguments that ttcfast/ops/arm.py has checked; ``volumes`` ``[*S]``, ``mask`` (bool) ``[*S]`` and ``values``
    ``[C, *S]`` are its fields, contiguous and in the accumulation dtype, or None. Makes one or two launches and never waits for the device.
    """
    state, candidates, gammas = call.state, call.candidates, call.gammas
    n, b, channels = candidates.shape[:3]
    if n == 0:
        return
    extents, state_strides, state_contiguous = _grid(state, 2)
    _, cand_strides, cand_contiguous = _grid(candidates, 3)
    cells = extents[0] * extents[1] * extents[2]
    config = pick_config((n, b, channels, cells), capability(state.device), state.element_size(), state_contiguous and cand_contiguous)
    tiles, groups = ceil_div(cells, config.tile), ceil_div(b, config.group)
    wide = state.dtype == torch.float64
    like = {"dtype": torch.float64 if wide else torch.float32, "device": state.device}
    partials = torch.empty((n, b, tiles, SLOTS.value), **like)
    folded = tiles <= MOST_FOLDED and volumes is None and mask is None
    sizes = torch.empty((n, groups if folded else 1, tiles, 4), **like) if relative else None
    m0, m1, m2 = [*call.velocity, -1, -1][:3]
    results = None if call.expected is None else call.expected.contiguous(), *out
    scales = 1.0 if volumes is not None else call.volume, *call.weights
    common = {"C": channels, "COMPONENTS": len(call.velocity), "MODE": mode, "STEP": config.step}
    submit(
        arm_partial_kernel,
        n * groups * tiles,
        state.device,
        state,
        candidates,
        gammas,
        volumes,
        mask,
        values,
        partials,
        sizes,
        *((launching.COUNTERS.get(n * groups, state.device), *results) if folded else [None] * 10),
        b,
        cells,
        extents[1],
        extents[2],
        groups,
        tiles,
        *state.stride()[:2],
        *state_strides,
        *candidates.stride()[:3],
        *cand_strides,
        gammas.stride(0) if gammas is not None and gammas.numel() > 1 else 0,
        call.gamma,
        call.value,
        *scales,
        RHO=call.density,
        M0=m0,
        M1=m1,
        M2=m2,
        E=call.energy,
        P=call.pressure,
        PRIMITIVE=call.primitive,
        STATE_CONTIGUOUS=state_contiguous,
        CAND_CONTIGUOUS=cand_contiguous,
        WHOLE=cells % config.tile == 0,
        ACC=tl.float64 if wide else tl.float32,
        GROUP=config.group,
        TILE=config.tile,
        VECTOR=config.vector,
        THREADS=config.threads,
        num_warps=config.warps,
        **common,
    )
    if not folded:
        submit(
            arm_finish_kernel,
            n * b,
            state.device,
            partials,
            sizes,
            *results,
            b,
            cells,
            tiles,
            *scales,
            MASKED=mask is not None,
            num_warps=config.finish_warps,
            **common,
        )


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit).

    ``:16`` asserts divisibility by 16. Conserved float32 and bfloat16 without fields must allow sixteen warps per multiprocessor, that is
    128 registers; 168 allow twelve. Nothing may spill.
    """
    layouts = {
        "conserved": {"RHO": 0, "M0": 1, "M1": 2, "M2": -1, "E": 3, "P": -1, "PRIMITIVE": False, "C": 4},
        "primitive 3-D": {"RHO": 0, "M0": 1, "M1": 2, "M2": 3, "E": -1, "P": 4, "PRIMITIVE": True, "C": 5},
    }
    for (stored, element), (name, channels) in product((("fp32", 4), ("bf16", 2), ("fp64", 8)), layouts.items()):
        plain = f"arm_partial {stored} {name}"
        yield _variant(plain, stored, element, channels, 65536, limit=168 if channels["PRIMITIVE"] or element == 8 else 128)
        yield _variant(f"{plain} with fields", stored, element, channels, 65536, fields=True, limit=168)
        small = CELLS_A_THREAD[element] * 32 * MOST_FOLDED
        yield _variant(f"{plain} in one launch", stored, element, channels, small, limit=168)
        yield _variant(f"{plain} with fields, strided", stored, element, channels, 65537, fields=True, contiguous=False, limit=168)
    for stored, element in (("fp32", 4), ("fp64", 8)):
        config = pick_config((1, 256, 4, 512 * 512), None, element)
        signature = {"partials": f"*{stored}:16", "sizes": f"*{stored}:16", **_results(stored), **SCALES}
        signature |= dict.fromkeys(("B", "cells", "tiles"), "i32")
        constants = {"C": 4, "COMPONENTS": 2, "MASKED": True, "MODE": 2, "STEP": config.step}
        yield f"arm_finish {stored}", arm_finish_kernel, signature, {"expected": None, **constants}, config.finish_warps, 128
        signature = {**signature, "expected": "*fp64"}
        yield f"arm_finish {stored} with expected changes", arm_finish_kernel, signature, constants, config.finish_warps, 128


SCALES = {"volume": "fp64", **dict.fromkeys(("w_mass", "w_momentum", "w_energy", "w_boundary", "w_positivity"), "fp64")}


def _results(stored):
    penalties = dict.fromkeys(("score", "mass", "momentum", "energy", "boundary", "positivity"), f"*{stored}")
    return {**penalties, "finite": "*i1", "residuals": "*fp64"}


def _variant(name, stored, element, channels, cells, *, limit, fields=False, contiguous=True):
    config = pick_config((1, 256, 4, cells), None, element, contiguous)
    acc, hint, integer = "fp64" if stored == "fp64" else "fp32", ":16" * contiguous, "i32" if contiguous else "i64"
    signature = {"state": f"*{stored}{hint}", "cand": f"*{stored}{hint}", "partials": f"*{acc}:16", "sizes": f"*{acc}:16"}
    optional = {"gammas": "*fp64", "volumes": f"*{acc}{hint}", "mask": f"*i1{hint}", "values": f"*{acc}{hint}"}
    signature |= optional if fields else {}
    strides = [f"{x}_{k}" for x in ("state", "cand") for k in "012"]
    signature |= dict.fromkeys(("B", "e1", "e2", "groups", "tiles", "gamma_n", *strides), integer)
    signature |= dict.fromkeys(("cells", "state_n", "state_c", "cand_n", "cand_b", "cand_c"), integer + hint)
    signature |= {"gamma": "fp64", "value": "fp64", "unit": "fp64", **SCALES}
    folded = {"arrived": "*i32", "expected": "*fp64", **_results(acc)}
    signature |= folded if cells <= config.tile * MOST_FOLDED and not fields else {}
    constants = {
        **dict.fromkeys(k for k in (*optional, *folded) if k not in signature),
        **channels,
        "STATE_CONTIGUOUS": contiguous,
        "CAND_CONTIGUOUS": contiguous,
    }
    constants |= {"WHOLE": cells % config.tile == 0, "ACC": tl.float64 if acc == "fp64" else tl.float32, "GROUP": config.group}
    constants |= {"TILE": config.tile, "VECTOR": config.vector, "THREADS": config.threads, "STEP": config.step, "MODE": 2}
    constants |= {"COMPONENTS": sum(channels[m] >= 0 for m in ("M0", "M1", "M2"))}
    return name, arm_partial_kernel, signature, constants, config.warps, limit
