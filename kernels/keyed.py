"""Keyed random operations: normals, noise on states, and dropout. Each element is a function of its row's key and its own number.

The definitions are in ttcfast/ops/keyed.py. The integers agree bit for bit. The normals repeat the steps of csrc/keyed_loop.cpp one by one,
with explicit fma and correctly rounded square roots, so they have the same bits on a GPU. One Philox call yields the four elements of a
group. Keys and rows are read on the device, so a captured CUDA graph replays with their current contents.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .launch import ceil_div, is_contiguous, submit


@lru_cache
def pick_config(elements, rows):
    """Return tile and group sizes for rows of ``elements`` elements, ``rows`` of which share an input row.

    Returns:
        (groups of four elements per tile, rows per program, warps).

    Not from a timing sweep: no GPU was available when it was written (Nov 2026). Two groups per thread give two independent chains of
    multiplications, and 16-byte loads and stores in float32; ``python -m bench.aot`` prints the registers.
    """
    tile = min(256, max(16, triton.next_power_of_2(ceil_div(elements, 4))))
    share = 1
    while share < 4 and share < rows:
        share *= 2
    return tile, share, 4 if tile == 256 else 1


@triton.jit
def philox_key(stream, site):
    """Return the low and high half of output number site + 1 of SplitMix64 started at the stream."""
    step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    z = tl.load(stream).to(tl.uint64, bitcast=True) + step * (tl.cast(site, tl.uint64) + 1)
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10 on uint32 words that broadcast against c0."""
    # One wide multiplication gives both halves; tl.umulhi beside a plain product compiles to two (counted in sm_90 code).
    m0 = tl.full((), 0xD2511F53, tl.uint64)
    m1 = tl.full((), 0xCD9E8D57, tl.uint64)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * m0, c2.to(tl.uint64) * m1
        c0, c1, c2, c3 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def draw(rows, row, group, k0, k1, ANTITHETIC: tl.constexpr):
    """Return the four words of each group of a row, and whether the row negates another one."""
    problem = tl.load(rows + 2 * row).to(tl.uint32)
    candidate = tl.load(rows + 2 * row + 1)
    opposite = tl.full((), 0, tl.int1)
    if ANTITHETIC:
        opposite = (candidate >= 2) & (candidate % 2 == 0)
        candidate -= opposite.to(tl.int64)
    zero = tl.zeros_like(group)
    a, b, c, d = philox(group, zero + candidate.to(tl.uint32), zero + (candidate >> 32).to(tl.uint32), zero + problem, k0, k1)
    return a, b, c, d, opposite


@triton.jit
def box_muller(a, b):
    """Return two normals from two words. The polynomials are those of csrc/keyed_loop.cpp, from ``python -m bench.fit_normal``."""
    large = a >= 0x80000000
    t = tl.minimum(a, a ^ 0xFFFFFFFF).to(tl.int32).to(tl.float32) + 0.5
    bits = t.to(tl.uint32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 1.0
    exponent = ((bits >> 23).to(tl.int32) - 158).to(tl.float32)
    f = tl.where(large, t * -2.3283064365386963e-10, mantissa)  # 2^-32
    f2 = f * f
    even = tl.fma(-2.82909846, f2, -2.41743279)
    even = tl.fma(even, f2, -0.527382374)
    even = tl.fma(even, f2, -0.667264223)
    even = tl.fma(even, f2, -2.0)
    odd = tl.fma(-3.2791853, f2, -0.361906648)
    odd = tl.fma(odd, f2, 0.487365156)
    odd = tl.fma(odd, f2, 0.999990463)
    square = tl.fma(tl.where(large, 0.0, exponent), -1.38629436, f * tl.fma(odd, f, even))
    radius = tl.sqrt_rn(square)

    turn = 3.657295198e-10  # 2 pi / 2^34
    x = tl.fma((b << 2).to(tl.int32, bitcast=True).to(tl.float32), turn, 2 * turn)
    x2 = x * x
    sine = tl.fma(-0.000195152825, x2, 0.0083321603)
    sine = tl.fma(tl.fma(sine, x2, -0.166666552), x * x2, x)
    cosine = tl.fma(-0.00135918532, x2, 0.0416557789)
    cosine = tl.fma(tl.fma(cosine, x2, -0.499998838), x2, 1.0)
    quarter = b + 0x20000000
    swap = (quarter & 0x40000000) != 0
    first = radius * tl.where(swap, sine, cosine)
    second = radius * tl.where(swap, cosine, sine)
    first = tl.where(((quarter + 0x40000000) & 0x80000000) != 0, -first, first)
    return first, tl.where((quarter & 0x80000000) != 0, -second, second)


@triton.jit
def in_line(a, b, c, d):
    """Join four [TILE] into [TILE, 4], with the elements of a group in one thread."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def normals(rows, row, group, k0, k1, ANTITHETIC: tl.constexpr):
    a, b, c, d, opposite = draw(rows, row, group, k0, k1, ANTITHETIC)
    z0, z1 = box_muller(a, b)
    z2, z3 = box_muller(c, d)
    z = in_line(z0, z1, z2, z3)
    if ANTITHETIC:
        z = tl.where(opposite, -z, z)
    return z


@triton.jit
def numbers(tile, TILE: tl.constexpr):
    """Return the numbers of the groups [TILE], uint32, and of their elements [TILE, 4] in a tile of a row."""
    group = tile * TILE + tl.arange(0, TILE).to(tl.int64)
    return group.to(tl.uint32), group[:, None] * 4 + tl.arange(0, 4).to(tl.int64)[None, :]


@triton.jit
def offsets_of(element, e1, e2, s0, s1, s2, CONTIGUOUS: tl.constexpr):
    """Return the element offsets of row-major elements in a strided row."""
    if CONTIGUOUS:
        offset = element
    else:
        offset = (element // e2 // e1) * s0 + (element // e2 % e1) * s1 + (element % e2) * s2
    return offset


@triton.jit
def store(at, value, inside, INTERPRETED: tl.constexpr):
    """Store, rounded to nearest even. Rounds to bfloat16 by hand in Triton 3.7's interpreter, which loses the carry."""
    if INTERPRETED and at.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(at, value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def normal_kernel(out, rows, stream, site, elements, tiles, ANTITHETIC: tl.constexpr, INTERPRETED: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    group, element = numbers(tile, TILE)
    k0, k1 = philox_key(stream, site)
    z = normals(rows, row, group, k0, k1, ANTITHETIC)
    store(out + row * elements + element, z, element < elements, INTERPRETED)


@triton.jit
def add_noise_kernel(
    out,
    x,
    rows,
    stream,
    site,
    elements,
    tiles,
    B,
    shares,
    sigma: tl.float64,
    x_n,
    e1,
    e2,
    x_0,
    x_1,
    x_2,
    ANTITHETIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
    SHARE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    share = program // tiles % shares
    n = program // tiles // shares
    group, element = numbers(tile, TILE)
    inside = element < elements
    k0, k1 = philox_key(stream, site)
    scale = tl.full((), sigma, tl.float64).to(ACC)
    at = x + n * x_n + offsets_of(element, e1, e2, x_0, x_1, x_2, CONTIGUOUS)
    clean = tl.load(at, mask=inside, other=0.0).to(ACC)  # shared by the candidates of this program
    for i in range(SHARE):
        b = share * SHARE + i
        if b < B:
            row = n * B + b
            z = normals(rows, row, group, k0, k1, ANTITHETIC).to(ACC)
            noisy = tl.fma(scale, z, clean)
            store(out + row * elements + element, noisy, inside, INTERPRETED)


@triton.jit(do_not_specialize=["threshold"])
def keyed_dropout_kernel(
    out,
    x,
    rows,
    stream,
    site,
    elements,
    tiles,
    threshold,
    scale: tl.float64,
    x_m,
    e1,
    e2,
    x_0,
    x_1,
    x_2,
    ANTITHETIC: tl.constexpr,
    INTERPRETED: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ACC: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, tile = program // tiles, program % tiles
    group, element = numbers(tile, TILE)
    inside = element < elements
    k0, k1 = philox_key(stream, site)
    a, b, c, d, opposite = draw(rows, row, group, k0, k1, ANTITHETIC)
    u = in_line(a, b, c, d)
    if ANTITHETIC:
        u = tl.where(opposite, u ^ 0xFFFFFFFF, u)
    at = x + row * x_m + offsets_of(element, e1, e2, x_0, x_1, x_2, CONTIGUOUS)
    kept = tl.load(at, mask=inside, other=0.0).to(ACC) * tl.full((), scale, tl.float64).to(ACC)
    kept = tl.where(u >= tl.cast(threshold, tl.uint32), kept, 0.0)
    store(out + row * elements + element, kept, inside, INTERPRETED)


def launch_normal(out, rows, stream, site, elements, antithetic):
    """Fill ``out`` [M, elements]. The arguments are those that ttcfast/ops/normal.py has checked."""
    if out.numel() == 0:
        return
    tile, _, warps = pick_config(elements, 1)
    tiles = ceil_div(elements, 4 * tile)
    submit(
        normal_kernel,
        rows.shape[0] * tiles,
        out.device,
        out,
        rows,
        stream,
        site,
        elements,
        tiles,
        ANTITHETIC=antithetic,
        INTERPRETED=interpreted(),
        TILE=tile,
        num_warps=warps,
    )


def launch_add_noise(out, x, sizes, strides, B, sigma, rows, stream, site, elements, antithetic):
    """Fill ``out`` [N, B, elements] from x [N, three sizes]. The arguments are those that ttcfast/ops/add_noise.py has checked."""
    if out.numel() == 0:
        return
    tile, share, warps = pick_config(elements, B)
    tiles, shares = ceil_div(elements, 4 * tile), ceil_div(B, share)
    submit(
        add_noise_kernel,
        x.shape[0] * shares * tiles,
        out.device,
        out,
        x,
        rows,
        stream,
        site,
        elements,
        tiles,
        B,
        shares,
        sigma,
        x.stride(0),
        sizes[1],
        sizes[2],
        *strides,
        ANTITHETIC=antithetic,
        INTERPRETED=interpreted(),
        CONTIGUOUS=is_contiguous(sizes, strides),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        TILE=tile,
        SHARE=share,
        num_warps=warps,
    )


def launch_keyed_dropout(out, x, sizes, strides, threshold, scale, rows, stream, site, elements, antithetic):
    """Fill ``out`` [M, elements] from x [M, three sizes]. The arguments are those that ttcfast/ops/keyed_dropout.py has checked."""
    if out.numel() == 0:
        return
    if threshold >= 2**32:  # larger than any draw
        out.zero_()
        return
    tile, _, warps = pick_config(elements, 1)
    tiles = ceil_div(elements, 4 * tile)
    submit(
        keyed_dropout_kernel,
        x.shape[0] * tiles,
        out.device,
        out,
        x,
        rows,
        stream,
        site,
        elements,
        tiles,
        threshold,
        scale,
        x.stride(0),
        sizes[1],
        sizes[2],
        *strides,
        ANTITHETIC=antithetic,
        INTERPRETED=interpreted(),
        CONTIGUOUS=is_contiguous(sizes, strides),
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        TILE=tile,
        num_warps=warps,
    )


def interpreted():
    return isinstance(normal_kernel, InterpretedFunction)


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit).

    128 registers let four blocks of 128 threads share a multiprocessor; nothing may spill.
    """
    tile, share, warps = pick_config(65536, 64)
    for stored in ("fp32", "bf16", "fp64"):
        common = {"out": f"*{stored}", "rows": "*i64", "stream": "*i64"}
        acc = tl.float64 if stored == "fp64" else tl.float32
        for full in (False, True):  # antithetic, strided, 64-bit sizes
            integer = "i64" if full else "i32"
            size = dict.fromkeys(("site", "elements", "tiles"), integer)
            fixed = {"ANTITHETIC": full, "INTERPRETED": False, "TILE": tile}
            name = f"{stored}{' antithetic' * full}"
            yield f"normal {name}", normal_kernel, {**common, **size}, fixed, warps, 128
            layout = {"e1": integer, "e2": integer, "x_0": integer, "x_1": integer, "x_2": integer}
            fixed |= {"CONTIGUOUS": not full, "ACC": acc}
            name += " strided" * full
            noise = {**common, **size, **layout, "x": f"*{stored}", "B": integer, "shares": integer, "sigma": "fp64", "x_n": integer}
            yield f"add_noise {name}", add_noise_kernel, noise, {**fixed, "SHARE": share}, warps, 128
            dropout = {**common, **size, **layout, "x": f"*{stored}", "threshold": "i64", "scale": "fp64", "x_m": integer}
            yield f"keyed_dropout {name}", keyed_dropout_kernel, dropout, fixed, warps, 128
