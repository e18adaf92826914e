"""The analytical reward in two fixed stages: partial sums per (problem, candidate, tile), then one program per candidate.

The definition is arm_ref in ttcfast/ops/arm_ref.py. Tile size and warps depend on the number of cells alone, so the order of every
addition, and with it every bit, is the same for any B, any split of it and any run.
"""

import torch
import triton
import triton.language as tl

SUMS = tl.constexpr(9)  # mass, momentum x 3, energy, boundary, negative density, negative pressure, values that are not finite
VELOCITY_GUARD = tl.constexpr(1e-12)  # the seed's compute_pressure divides by rho + 1e-12


def pick_config(shape, capability, wide=False):
    """Tile and group sizes for ``shape = (N, B, C, cells)`` on a device of this compute capability; ``wide`` for float64.

    Returns:
        (cells per tile, candidates per program, warps of stage 1, partials per step of stage 2).

    Not from a timing sweep: no GPU was at hand when it was written (Nov 2026). From ``python -m bench.aot`` over 8, 4 and 2 cells a
    thread: 8 spilled in float64 and with strided fields; 4 (one 16-byte load per channel in float32; 2 in float64) do not.
    Eight candidates share a state tile.
    """
    _, candidates, _, cells = shape
    tile = min(512 if wide else 1024, max(16, triton.next_power_of_2(cells)))
    group = 1
    while group < 8 and group < candidates:
        group *= 2
    return tile, group, 8 if tile >= 512 else 1, 128


@triton.jit
def _space_offsets(cell, e1, e2, s0, s1, s2, CONTIGUOUS: tl.constexpr):
    """Element offsets of row-major cells in a strided grid."""
    if CONTIGUOUS:
        offset = cell
    else:
        offset = (cell // e2 // e1) * s0 + (cell // e2 % e1) * s1 + (cell % e2) * s2
    return offset


@triton.jit
def arm_partial_kernel(
    state,
    cand,
    gammas,
    volumes,
    mask,
    values,
    partials,
    B,
    cells,
    e1,
    e2,
    groups,
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
    C: tl.constexpr,
    RHO: tl.constexpr,
    M0: tl.constexpr,
    M1: tl.constexpr,
    M2: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
    PRIMITIVE: tl.constexpr,
    STATE_CONTIGUOUS: tl.constexpr,
    CAND_CONTIGUOUS: tl.constexpr,
    ACC: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    # A constexpr times an int32 argument would stay int32 and overflow. tl.cast, since a stride of 1 arrives as a constexpr.
    state_c, cand_c, channel_cells = tl.cast(state_c, tl.int64), tl.cast(cand_c, tl.int64), tl.cast(cells, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    group = program // tiles % groups
    n = program // tiles // groups
    cell = tile * TILE + tl.arange(0, TILE).to(tl.int64)  # [TILE]
    inside = cell < cells
    gamma = tl.load(gammas + n).to(ACC)
    zero = tl.zeros([TILE], dtype=ACC)
    if volumes is not None:
        volume = tl.load(volumes + cell, mask=inside, other=0.0)
    else:
        volume = zero + 1
    if mask is not None:
        masked = tl.load(mask + cell, mask=inside, other=0).to(tl.int32) != 0
    prescribed = tl.full([TILE], value, tl.float64).to(ACC)

    # The state's named channels stay in registers while the group's candidates stream past.
    at = state + n * state_n + _space_offsets(cell, e1, e2, state_0, state_1, state_2, STATE_CONTIGUOUS)
    rho_old = tl.load(at + RHO * state_c, mask=inside, other=1.0).to(ACC)
    m0_old = tl.load(at + M0 * state_c, mask=inside, other=0.0).to(ACC)
    m1_old, m2_old, e_old, p_old = zero, zero, zero, zero
    if M1 >= 0:
        m1_old = tl.load(at + M1 * state_c, mask=inside, other=0.0).to(ACC)
    if M2 >= 0:
        m2_old = tl.load(at + M2 * state_c, mask=inside, other=0.0).to(ACC)
    if E >= 0:
        e_old = tl.load(at + E * state_c, mask=inside, other=0.0).to(ACC)
    if P >= 0:
        p_old = tl.load(at + P * state_c, mask=inside, other=0.0).to(ACC)

    offsets = _space_offsets(cell, e1, e2, cand_0, cand_1, cand_2, CAND_CONTIGUOUS)
    for i in range(GROUP):
        b = group * GROUP + i
        if b < B:
            base = cand + n * cand_n + b * cand_b + offsets
            rho, m0, m1, m2, e, p = zero, zero, zero, zero, zero, zero
            bad, away = zero, zero
            for c in tl.static_range(C):
                # Cells outside hold the state's own filling: no change, nothing negative, nothing bad.
                fill = 1.0 if c == RHO else 0.0
                row = tl.load(base + c * cand_c, mask=inside, other=fill).to(ACC)
                bad += tl.where(tl.abs(row) < float("inf"), 0.0, 1.0)
                if mask is not None:
                    if values is not None:
                        prescribed = tl.load(values + c * channel_cells + cell, mask=inside & masked, other=0.0)
                    away += tl.where(masked, tl.abs(row - prescribed), 0.0)
                if c == RHO:
                    rho = row
                if c == M0:
                    m0 = row
                if c == M1:
                    m1 = row
                if c == M2:
                    m2 = row
                if c == E:
                    e = row
                if c == P:
                    p = row

            d_rho = rho - rho_old
            d0 = m0 - m0_old
            d1 = m1 - m1_old
            d2 = m2 - m2_old
            d_energy = e - e_old
            if PRIMITIVE:
                if E < 0:
                    square = m0 * m0 + m1 * m1 + m2 * m2
                    change = d0 * (m0 + m0_old) + d1 * (m1 + m1_old) + d2 * (m2 + m2_old)
                    d_energy = (p - p_old) / (gamma - 1) + 0.5 * (square * d_rho + rho_old * change)
                d0 = rho * d0 + m0_old * d_rho
                d1 = rho * d1 + m1_old * d_rho
                d2 = rho * d2 + m2_old * d_rho
            elif P < 0:
                v0 = m0 / (rho + VELOCITY_GUARD)
                v1 = m1 / (rho + VELOCITY_GUARD)
                v2 = m2 / (rho + VELOCITY_GUARD)
                p = (gamma - 1) * (e - 0.5 * rho * (v0 * v0 + v1 * v1 + v2 * v2))

            into = partials + ((n * B + b) * SUMS) * tiles + tile
            tl.store(into, tl.sum(volume * d_rho))
            tl.store(into + tiles, tl.sum(volume * d0))
            tl.store(into + 2 * tiles, tl.sum(volume * d1))
            tl.store(into + 3 * tiles, tl.sum(volume * d2))
            tl.store(into + 4 * tiles, tl.sum(volume * d_energy))
            tl.store(into + 5 * tiles, tl.sum(away))
            tl.store(into + 6 * tiles, tl.sum(tl.where(rho >= 0, 0.0, -rho)))  # NaN stays NaN
            tl.store(into + 7 * tiles, tl.sum(tl.where((p >= 0) | (cell >= cells), 0.0, -p)))
            tl.store(into + 8 * tiles, tl.sum(bad))


@triton.jit
def _total(at, tiles, STEP: tl.constexpr):
    """Sum of ``tiles`` partials in float64: a fixed tree per step, steps in order."""
    lane = tl.arange(0, STEP)
    total = tl.zeros([STEP], dtype=tl.float64)
    for start in range(0, tiles, STEP):
        total += tl.load(at + start + lane, mask=start + lane < tiles, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def arm_finish_kernel(
    partials,
    scales,
    masked,
    score,
    mass,
    momentum,
    energy,
    boundary,
    positivity,
    finite,
    residuals,
    B,
    C,
    cells,
    tiles,
    volume: tl.float64,
    w_mass: tl.float64,
    w_momentum: tl.float64,
    w_energy: tl.float64,
    w_boundary: tl.float64,
    w_positivity: tl.float64,
    COMPONENTS: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    n = at // B
    base = partials + at * SUMS * tiles
    unit = tl.full((), volume, tl.float64)
    r_mass = unit * _total(base, tiles, STEP)
    r0 = unit * _total(base + tiles, tiles, STEP)
    r1 = unit * _total(base + 2 * tiles, tiles, STEP)
    r2 = unit * _total(base + 3 * tiles, tiles, STEP)
    r_energy = unit * _total(base + 4 * tiles, tiles, STEP)
    p_boundary = _total(base + 5 * tiles, tiles, STEP)
    p_positivity = (_total(base + 6 * tiles, tiles, STEP) + _total(base + 7 * tiles, tiles, STEP)) / cells
    good = _total(base + 8 * tiles, tiles, STEP) == 0

    row = residuals + at * (COMPONENTS + 2)
    tl.store(row, r_mass)
    tl.store(row + 1, r0)
    if COMPONENTS > 1:
        tl.store(row + 2, r1)
    if COMPONENTS > 2:
        tl.store(row + 3, r2)
    tl.store(row + COMPONENTS + 1, r_energy)

    # Components that are absent have residual 0 and change no sum.
    if MODE == 0:
        p_momentum = tl.abs(r0 + r1 + r2)
    elif MODE == 1:
        p_momentum = tl.abs(r0) + tl.abs(r1) + tl.abs(r2)
    else:
        p_momentum = tl.sqrt(r0 * r0 + r1 * r1 + r2 * r2)
    p_mass = tl.abs(r_mass)
    p_energy = tl.abs(r_energy)
    if scales is not None:
        p_mass = p_mass / tl.load(scales + n * 3)
        p_momentum = p_momentum / tl.load(scales + n * 3 + 1)
        p_energy = p_energy / tl.load(scales + n * 3 + 2)
    if masked is not None:
        p_boundary = p_boundary / tl.maximum(tl.load(masked) * C, 1).to(tl.float64)

    p_mass = tl.where(good & (p_mass == p_mass), p_mass, float("inf"))
    p_momentum = tl.where(good & (p_momentum == p_momentum), p_momentum, float("inf"))
    p_energy = tl.where(good & (p_energy == p_energy), p_energy, float("inf"))
    p_boundary = tl.where(good & (p_boundary == p_boundary), p_boundary, float("inf"))
    p_positivity = tl.where(good & (p_positivity == p_positivity), p_positivity, float("inf"))
    total = w_mass * p_mass + w_momentum * p_momentum + w_energy * p_energy + w_boundary * p_boundary + w_positivity * p_positivity
    tl.store(mass + at, p_mass)
    tl.store(momentum + at, p_momentum)
    tl.store(energy + at, p_energy)
    tl.store(boundary + at, p_boundary)
    tl.store(positivity + at, p_positivity)
    tl.store(score + at, tl.where(tl.abs(total) < float("inf"), -total, float("-inf")))
    tl.store(finite + at, good)


def _grid(x, lead):
    """Three space sizes, three space strides, and whether they are one contiguous run."""
    pad = 3 + lead - x.ndim
    sizes, strides = [1] * pad + list(x.shape[lead:]), [0] * pad + list(x.stride()[lead:])
    expected, contiguous = 1, True
    for size, stride in zip(reversed(sizes), reversed(strides)):
        contiguous &= size == 1 or stride == expected
        expected *= size
    return sizes, strides, contiguous


def launch(
    state,  # [N, C, *S]
    candidates,  # [N, B, C, *S]
    out,  # score, five penalties [N, B], finite [N, B], residuals [N, B, components + 2]
    *,
    gammas,  # float64 [N]
    volumes,  # [*S] contiguous, or None
    volume,
    mask,  # bool [*S] contiguous, or None
    values,  # [C, *S] contiguous, or None
    value,
    scales,  # float64 [N, 3], or None
    density,
    velocity,
    energy,
    pressure,
    primitive,
    mode,
    weights,
):
    """Fill ``out``. The arguments are those that ttcfast/ops/arm.py has checked."""
    n, b, channels = candidates.shape[:3]
    sizes, state_strides, state_contiguous = _grid(state, 2)
    _, cand_strides, cand_contiguous = _grid(candidates, 3)
    cells = sizes[0] * sizes[1] * sizes[2]
    capability = torch.cuda.get_device_capability(state.device) if state.is_cuda else None
    wide = state.dtype == torch.float64
    tile, group, warps, step = pick_config((n, b, channels, cells), capability, wide)
    tiles, groups = triton.cdiv(cells, tile), triton.cdiv(b, group)
    if n == 0:
        return
    partials = torch.empty((n, b, SUMS.value, tiles), dtype=torch.float64 if wide else torch.float32, device=state.device)
    components = len(velocity)
    m0, m1, m2 = [*velocity, -1, -1][:3]
    arm_partial_kernel[(n * groups * tiles,)](
        state,
        candidates,
        gammas,
        volumes,
        mask,
        values,
        partials,
        b,
        cells,
        sizes[1],
        sizes[2],
        groups,
        tiles,
        *state.stride()[:2],
        *state_strides,
        *candidates.stride()[:3],
        *cand_strides,
        value,
        C=channels,
        RHO=density,
        M0=m0,
        M1=m1,
        M2=m2,
        E=energy,
        P=pressure,
        PRIMITIVE=primitive,
        STATE_CONTIGUOUS=state_contiguous,
        CAND_CONTIGUOUS=cand_contiguous,
        ACC=tl.float64 if wide else tl.float32,
        GROUP=group,
        TILE=tile,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    arm_finish_kernel[(n * b,)](
        partials,
        scales,
        None if mask is None else mask.sum(),
        *out,
        b,
        channels,
        cells,
        tiles,
        1.0 if volumes is not None else volume,
        *weights,
        COMPONENTS=components,
        MODE=mode,
        STEP=step,
        num_warps=1,
        enable_fp_fusion=False,
    )


def variants():
    """What is compiled ahead of time: (name, kernel, signature, constants, warps, most registers).

    Blocks have 256 threads. 128 registers let two of them share a multiprocessor, which the contiguous path must keep; strided layouts
    hold int64 offsets besides and may take the hardware's 255. Nothing may spill.
    """
    layouts = {
        "conserved": {"RHO": 0, "M0": 1, "M1": 2, "M2": -1, "E": 3, "P": -1, "PRIMITIVE": False, "C": 4},
        "primitive 3-D": {"RHO": 0, "M0": 1, "M1": 2, "M2": 3, "E": -1, "P": 4, "PRIMITIVE": True, "C": 5},
    }
    integers = ["B", "cells", "e1", "e2", "groups", "tiles", *(f"state_{k}" for k in "nc012"), *(f"cand_{k}" for k in "nbc012")]
    for stored, acc in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        tile, group, warps, step = pick_config((1, 64, 4, 65536), None, acc == "fp64")
        for name, channels in layouts.items():
            for full in (False, True):
                pointers = {"volumes": f"*{acc}", "mask": "*i1", "values": f"*{acc}"}
                signature = {"state": f"*{stored}", "cand": f"*{stored}", "gammas": "*fp64"}
                signature |= pointers if full else {}
                signature |= {"partials": f"*{acc}", **dict.fromkeys(integers, "i64" if full else "i32"), "value": "fp64"}
                constants = {} if full else dict.fromkeys(pointers)
                constants |= {**channels, "STATE_CONTIGUOUS": not full, "CAND_CONTIGUOUS": not full}
                constants |= {"ACC": tl.float64 if acc == "fp64" else tl.float32, "GROUP": group, "TILE": tile}
                yield (
                    f"arm_partial {stored} {name}{' strided, with fields' * full}",
                    arm_partial_kernel,
                    signature,
                    constants,
                    warps,
                    255 if full else 128,
                )
        outputs = dict.fromkeys(("score", "mass", "momentum", "energy", "boundary", "positivity"), f"*{acc}")
        floats = ("volume", "w_mass", "w_momentum", "w_energy", "w_boundary", "w_positivity")
        signature = {"partials": f"*{acc}", "scales": "*fp64", "masked": "*i64", **outputs, "finite": "*i1", "residuals": "*fp64"}
        signature |= {**dict.fromkeys(("B", "C", "cells", "tiles"), "i32"), **dict.fromkeys(floats, "fp64")}
        yield f"arm_finish {stored}", arm_finish_kernel, signature, {"COMPONENTS": 2, "MODE": 2, "STEP": step}, 1, 128
