"""The two stages of ops.arm: partial sums of a tile for a group of candidates, and the reduction of a candidate's partials.

The second is a kernel of its own, or what the last of a group's programs does before it ends.
"""

import triton
import triton.language as tl

from .fold import fold, totals

SLOTS = tl.constexpr(8)  # slots of a partial: mass, momentum x 2, energy, momentum 3, boundary, negative density and pressure, masked cells
BROKEN = tl.constexpr(float("-inf"))  # replaces the count of masked cells if a value of the tile is not finite
VELOCITY_GUARD = tl.constexpr(1e-12)  # the TTC plan's compute_pressure divides by rho + 1e-12
UNROLL = tl.constexpr(2)  # steps that the last program of a group loads at once: 32 registers; with four, sm_80 spills some
SCALE_GUARD = tl.constexpr(1e-12)  # smallest denominator of a relative residual, times the domain's volume


@triton.jit
def _space_offsets(cell, e1, e2, s0, s1, s2):
    """Return the element offsets of row-major cells in a strided grid."""
    return (cell // e2 // e1) * s0 + (cell // e2 % e1) * s1 + (cell % e2) * s2


@triton.jit
def _load(at, inside, fill, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """Load, with ``fill`` outside; full tiles use no mask, so that loads can be 16 bytes wide."""
    if WHOLE:
        found = tl.load(at, eviction_policy=EVICT)
    else:
        found = tl.load(at, mask=inside, other=fill, eviction_policy=EVICT)
    return found


@triton.jit
def _pressure(rho, m0, m1, m2, energy, heat):
    """The TTC plan's compute_pressure."""
    v0 = m0 / (rho + VELOCITY_GUARD)
    v1 = m1 / (rho + VELOCITY_GUARD)
    v2 = m2 / (rho + VELOCITY_GUARD)
    return heat * (energy - 0.5 * rho * (v0 * v0 + v1 * v1 + v2 * v2))


@triton.jit
def _finish(
    sums,
    sizes,
    at,
    real,
    n,
    expected,
    score,
    mass,
    momentum,
    energy,
    boundary,
    positivity,
    finite,
    residuals,
    C: tl.constexpr,
    cells,
    volume,
    w_mass,
    w_momentum,
    w_energy,
    w_boundary,
    w_positivity,
    COMPONENTS: tl.constexpr,
    MASKED: tl.constexpr,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the results of the candidates number ``at [GROUP]``, as far as they are ``real``, of problem ``n``.

    ``sums [GROUP * SLOTS]`` and ``sizes [4]`` (or None) are the totals in float64.
    """
    unit = tl.full((), volume, tl.float64)
    # Slot 4 i + 2 j + k of a partial, split by k first.
    even, odd = tl.split(tl.reshape(sums, [GROUP, 2, 2, 2]))
    zero_four, two_six = tl.split(even)
    one_five, three_seven = tl.split(odd)
    mass_change, third = tl.split(zero_four)  # [GROUP]
    first, away = tl.split(one_five)
    second, negative = tl.split(two_six)
    energy_change, masked = tl.split(three_seven)
    r_mass = unit * mass_change
    r0 = unit * first
    r1 = unit * second
    r2 = tl.zeros_like(r0)
    if COMPONENTS > 2:
        r2 = unit * third
    r_energy = unit * energy_change
    if expected is not None:
        row = expected + n * (COMPONENTS + 2)
        r_mass -= tl.load(row)
        r0 -= tl.load(row + 1)
        if COMPONENTS > 1:
            r1 -= tl.load(row + 2)
        if COMPONENTS > 2:
            r2 -= tl.load(row + 3)
        r_energy -= tl.load(row + COMPONENTS + 1)
    p_positivity = negative / cells
    good = masked >= 0
    p_boundary = tl.zeros_like(r0)
    if MASKED:
        p_boundary = away / tl.maximum(masked * C, 1.0)

    row = residuals + at * (COMPONENTS + 2)
    tl.store(row, r_mass, mask=real)
    tl.store(row + 1, r0, mask=real)
    if COMPONENTS > 1:
        tl.store(row + 2, r1, mask=real)
    if COMPONENTS > 2:
        tl.store(row + 3, r2, mask=real)
    tl.store(row + COMPONENTS + 1, r_energy, mask=real)

    # Absent components have residual 0 and change no sum.
    if MODE == 0:
        p_momentum = tl.abs(r0 + r1 + r2)
    elif MODE == 1:
        p_momentum = tl.abs(r0) + tl.abs(r1) + tl.abs(r2)
    else:
        p_momentum = tl.sqrt(r0 * r0 + r1 * r1 + r2 * r2)
    p_mass = tl.abs(r_mass)
    p_energy = tl.abs(r_energy)
    if sizes is not None:
        even, odd = tl.split(tl.reshape(unit * sizes, [2, 2]))
        s_mass, s_energy = tl.split(even)
        s_momentum, whole = tl.split(odd)
        least = SCALE_GUARD * whole
        # Propagates NaN.
        p_mass = p_mass / tl.where(s_mass < least, least, s_mass)
        p_momentum = p_momentum / tl.where(s_momentum < least, least, s_momentum)
        p_energy = p_energy / tl.where(s_energy < least, least, s_energy)

    p_mass = tl.where(good & (p_mass == p_mass), p_mass, float("inf"))
    p_momentum = tl.where(good & (p_momentum == p_momentum), p_momentum, float("inf"))
    p_energy = tl.where(good & (p_energy == p_energy), p_energy, float("inf"))
    p_boundary = tl.where(good & (p_boundary == p_boundary), p_boundary, float("inf"))
    p_positivity = tl.where(good & (p_positivity == p_positivity), p_positivity, float("inf"))
    total = w_mass * p_mass + w_momentum * p_momentum + w_energy * p_energy + w_boundary * p_boundary + w_positivity * p_positivity
    tl.store(mass + at, p_mass, mask=real)
    tl.store(momentum + at, p_momentum, mask=real)
    tl.store(energy + at, p_energy, mask=real)
    tl.store(boundary + at, p_boundary, mask=real)
    tl.store(positivity + at, p_positivity, mask=real)
    tl.store(score + at, tl.where(tl.abs(total) < float("inf"), -total, float("-inf")), mask=real)
    tl.store(finite + at, good, mask=real)


@triton.jit
def arm_partial_kernel(
    state,
    cand,
    gammas,
    volumes,
    mask,
    values,
    partials,
    sizes,
    arrived,  # None: the second stage is a kernel of its own, and gets the arguments from here to `residuals`
    expected,
    score,
    mass,
    momentum,
    energy,
    boundary,
    positivity,
    finite,
    residuals,
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
    gamma_n,
    gamma: tl.float64,
    value: tl.float64,
    unit: tl.float64,
    w_mass: tl.float64,
    w_momentum: tl.float64,
    w_energy: tl.float64,
    w_boundary: tl.float64,
    w_positivity: tl.float64,
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
    WHOLE: tl.constexpr,
    ACC: tl.constexpr,
    COMPONENTS: tl.constexpr,
    MODE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
    THREADS: tl.constexpr,
    STEP: tl.constexpr,
):
    # A constexpr times an int32 argument would stay int32 and overflow, and a stride of 1 arrives as a constexpr: hence tl.cast.
    state_c, cand_c, channel_cells = tl.cast(state_c, tl.int64), tl.cast(cand_c, tl.int64), tl.cast(cells, tl.int64)
    WIDE: tl.constexpr = ACC.primitive_bitwidth == 64
    BITS: tl.constexpr = tl.int64 if WIDE else tl.int32
    MAGNITUDE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    INFINITE: tl.constexpr = 0x7FF0000000000000 if WIDE else 0x7F800000
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    group = program // tiles % groups
    n = program // tiles // groups
    first = tile * TILE
    lane = tl.arange(0, TILE)  # [TILE], added to a 64-bit base address of the program
    inside = first + lane < cells
    if gammas is not None:
        heat = tl.load(gammas + n * gamma_n).to(ACC) - 1
    else:
        heat = tl.full((), gamma, tl.float64).to(ACC) - 1
    per_heat = 1 / heat
    zero = tl.zeros([TILE], dtype=ACC)
    if volumes is not None:
        volume = _load(volumes + first + lane, inside, 0.0, WHOLE, "evict_last")
    else:
        volume = zero + 1
    masked_cells = tl.full((), 0, tl.int32)
    if mask is not None:
        masked = _load(mask + first + lane, inside, 0, WHOLE, "evict_last").to(tl.int32) != 0
        masked_cells = tl.sum(masked.to(tl.int32))
    prescribed = tl.full([TILE], value, tl.float64).to(ACC)

    # The state's named channels stay in registers while the group's candidates stream past. Cells outside hold rho = E = 1 and 0 elsewhere:
    # no change, nothing negative, everything finite.
    if STATE_CONTIGUOUS:
        at = state + n * state_n + first + lane
    else:
        at = state + n * state_n + _space_offsets(first + lane, e1, e2, state_0, state_1, state_2)
    rho_old = _load(at + RHO * state_c, inside, 1.0, WHOLE, "evict_last").to(ACC)
    m0_old = _load(at + M0 * state_c, inside, 0.0, WHOLE, "evict_last").to(ACC)
    m1_old, m2_old, e_old, p_old = zero, zero, zero, zero
    if M1 >= 0:
        m1_old = _load(at + M1 * state_c, inside, 0.0, WHOLE, "evict_last").to(ACC)
    if M2 >= 0:
        m2_old = _load(at + M2 * state_c, inside, 0.0, WHOLE, "evict_last").to(ACC)
    if E >= 0:
        e_old = _load(at + E * state_c, inside, 1.0, WHOLE, "evict_last").to(ACC)
    if P >= 0:
        p_old = _load(at + P * state_c, inside, 0.0, WHOLE, "evict_last").to(ACC)
    if sizes is not None:  # noqa: SIM102  (known when compiling; the other when running)
        if arrived is not None or group == 0:  # a group that finishes itself has its own, so that it waits for no other
            weight = tl.where(inside, volume, 0.0)
            square = m0_old * m0_old + m1_old * m1_old + m2_old * m2_old
            pressure, energy_old = p_old, e_old
            if P < 0:
                pressure = _pressure(rho_old, m0_old, m1_old, m2_old, e_old, heat)
            if E < 0:
                energy_old = p_old * per_heat + 0.5 * rho_old * square
            speed = tl.sqrt(square)
            if PRIMITIVE:
                speed = tl.abs(rho_old) * speed
            # Propagates NaN.
            sound = tl.sqrt((heat + 1) * tl.where(pressure < 0, 0.0, pressure) * tl.where(rho_old < 0, 0.0, rho_old))
            packed = tl.join(tl.join(weight * tl.abs(rho_old), weight * tl.abs(energy_old)), tl.join(weight * (speed + sound), weight))
            place = n * tiles + tile
            if arrived is not None:
                place = program
            tl.store(sizes + place * 4 + tl.arange(0, 4), fold(packed, TILE, 4, VECTOR, THREADS))

    if CAND_CONTIGUOUS:
        offsets = lane
    else:
        offsets = _space_offsets(first + lane, e1, e2, cand_0, cand_1, cand_2)
    for i in range(tl.minimum(GROUP, B - group * GROUP)):
        b = group * GROUP + i
        if CAND_CONTIGUOUS:
            base = cand + n * cand_n + b * cand_b + first
        else:
            base = cand + n * cand_n + b * cand_b
        rho, m0, m1, m2, e, p = zero, zero, zero, zero, zero, zero
        worst = tl.zeros([TILE], dtype=BITS)
        away = zero
        for c in tl.static_range(C):
            fill = 1.0 if c == RHO or c == E else 0.0  # noqa: SIM109  (Triton knows no `in`)
            row = _load(base + c * cand_c + offsets, inside, fill, WHOLE, "evict_first").to(ACC)
            worst = tl.maximum(worst, row.to(BITS, bitcast=True) & MAGNITUDE)
            if mask is not None:  # noqa: SIM102
                if masked_cells > 0:
                    if values is not None:
                        prescribed = tl.load(values + c * channel_cells + first + lane, mask=inside & masked, other=0.0)
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

        # Certainly positive: tested without a division, with a margin for the rounding of the division it saves.
        square = m0 * m0 + m1 * m1 + m2 * m2
        if P < 0:
            safe = (rho > 0) & (rho * e * (1 - 2.0**-18) > 0.5 * square)
        else:
            safe = (rho >= 0) & (p >= 0)
        kind = tl.max(tl.where(worst >= INFINITE, 2, tl.where(safe, 0, 1)))
        negative = tl.full((), 0.0, ACC)
        if kind == 1:
            pressure = p
            if P < 0:
                pressure = _pressure(rho, m0, m1, m2, e, heat)
            lost = tl.where(rho >= 0, 0.0, -rho) + tl.where(pressure >= 0, 0.0, -pressure)
            negative = tl.sum(fold(lost, TILE, 1, VECTOR, THREADS))

        d_rho = rho - rho_old
        d0 = m0 - m0_old
        d1 = m1 - m1_old
        d2 = m2 - m2_old
        d_energy = e - e_old
        if PRIMITIVE:
            if E < 0:
                change = d0 * (m0 + m0_old) + d1 * (m1 + m1_old) + d2 * (m2 + m2_old)
                d_energy = (p - p_old) * per_heat + 0.5 * (square * d_rho + rho_old * change)
            d0 = rho * d0 + m0_old * d_rho
            d1 = rho * d1 + m1_old * d_rho
            d2 = rho * d2 + m2_old * d_rho
        packed = tl.join(tl.join(volume * d_rho, volume * d1), tl.join(volume * d0, volume * d_energy))
        into = partials + ((n * B + b) * tiles + tile) * SLOTS
        tl.store(into + tl.arange(0, 4), fold(packed, TILE, 4, VECTOR, THREADS))
        if M2 >= 0:
            tl.store(into + 4, tl.sum(fold(volume * d2, TILE, 1, VECTOR, THREADS)))
        if mask is not None:
            if masked_cells > 0:
                tl.store(into + 5, tl.sum(fold(away, TILE, 1, VECTOR, THREADS)))
            else:
                tl.store(into + 5, 0.0)
        tl.store(into + 6, negative)
        tl.store(into + 7, tl.where(kind == 2, BROKEN, masked_cells.to(ACC)))

    if arrived is not None:
        tl.debug_barrier()  # all of this program's sums are written before it says so
        if tl.atomic_add(arrived + program // tiles, 1, sem="acq_rel") == tiles - 1:
            tl.store(arrived + program // tiles, 0)  # for the next launch
            own = group * GROUP + tl.arange(0, GROUP)
            column = tl.arange(0, GROUP * SLOTS)
            begin = partials + (n * B + group * GROUP) * tiles * SLOTS
            columns = column // SLOTS * (tiles * SLOTS) + column % SLOTS
            sums = totals(begin, tiles, columns, group * GROUP + column // SLOTS < B, SLOTS, STEP, UNROLL)
            whole = None
            if sizes is not None:
                four = tl.arange(0, 4)
                whole = totals(sizes + (program - tile) * 4, tiles, four, four < 4, 4, STEP, UNROLL)
            _finish(
                sums,
                whole,
                n * B + own,
                own < B,
                n,
                expected,
                score,
                mass,
                momentum,
                energy,
                boundary,
                positivity,
                finite,
                residuals,
                C,
                cells,
                unit,
                w_mass,
                w_momentum,
                w_energy,
                w_boundary,
                w_positivity,
                COMPONENTS,
                mask is not None,
                MODE,
                GROUP,
            )


@triton.jit
def arm_finish_kernel(
    partials,
    sizes,
    expected,
    score,
    mass,
    momentum,
    energy,
    boundary,
    positivity,
    finite,
    residuals,
    B,
    cells,
    tiles,
    volume: tl.float64,
    w_mass: tl.float64,
    w_momentum: tl.float64,
    w_energy: tl.float64,
    w_boundary: tl.float64,
    w_positivity: tl.float64,
    C: tl.constexpr,
    COMPONENTS: tl.constexpr,
    MASKED: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64)
    n = at // B
    slot, four, one = tl.arange(0, SLOTS), tl.arange(0, 4), tl.arange(0, 1)
    sums = totals(partials + at * tiles * SLOTS, tiles, slot, slot < SLOTS, SLOTS, STEP, 1)
    whole = None
    if sizes is not None:
        whole = totals(sizes + n * tiles * 4, tiles, four, four < 4, 4, STEP, 1)
    _finish(
        sums,
        whole,
        at + one,
        one < 1,
        n,
        expected,
        score,
        mass,
        momentum,
        energy,
        boundary,
        positivity,
        finite,
        residuals,
        C,
        cells,
        volume,
        w_mass,
        w_momentum,
        w_energy,
        w_boundary,
        w_positivity,
        COMPONENTS,
        MASKED,
        MODE,
        1,
    )
