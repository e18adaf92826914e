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

ENOUGH_PROGRAMS = 2112  # 16 of 4 warps on each of the 132 multiprocessors of an H100


@lru_cache
def pick_config(elements, rows, shared=None, groups=4):
    """Return the sizes for ``rows`` rows of ``elements`` elements, with ``groups`` groups of four elements per thread.

    Returns:
        (groups per part, parts per program: of one row, or the same of ``shared`` rows; warps).

    Not from a timing sweep: no GPU was available when it was written (Nov 2026). Groups of a thread share constants, give independent
    chains of multiplications, and are loaded and stored 16 bytes at a time in float32; parts of a program share the keys, as long as there
    are enough programs. ``python -m bench.aot`` prints registers and instructions.
    """
    part = min(128 * groups, max(16, triton.next_power_of_2(ceil_div(elements, 4))))
    parts = ceil_div(elements, 4 * part)
    most, repeats = min(8, shared or parts), 1
    while repeats < most and rows * parts >= 2 * repeats * ENOUGH_PROGRAMS:
        repeats *= 2
    return part, repeats, max(1, part // (32 * groups))


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
def wide_product(a, M: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the high and low half of a uint32 times ``M``."""
    if INTERPRETED:
        product = a.to(tl.uint64) * tl.full((), M, tl.uint64)
        return (product >> 32).to(tl.uint32), product.to(tl.uint32)
    else:
        # One instruction. LLVM rewrites a widened product whose halves are used apart, mostly into two (counted in sm_90 code).
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",
            [a, tl.full((), M, tl.uint32)],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )


@triton.jit
def philox(c0, c1, c2, c3, k0, k1, INTERPRETED: tl.constexpr):
    """Philox 4x32-10 on uint32 words. What depends on scalars alone is computed once for all elements."""
    for _ in tl.static_range(10):
        high0, low0 = wide_product(c0, 0xD2511F53, INTERPRETED)
        high1, low1 = wide_product(c2, 0xCD9E8D57, INTERPRETED)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def name_of(rows, row, ANTITHETIC: tl.constexpr):
    """Return the words of a row's counter behind the group, and whether the row negates another one."""
    problem = tl.load(rows + 2 * row).to(tl.uint32)
    candidate = tl.load(rows + 2 * row + 1)
    opposite = tl.full((), 0, tl.int1)
    if ANTITHETIC:
        opposite = (candidate >= 2) & (candidate % 2 == 0)
        candidate -= opposite.to(tl.int64)
    return candidate.to(tl.uint32), (candidate >> 32).to(tl.uint32), problem, opposite


@triton.jit
def box_muller(a, b, opposite, INTERPRETED: tl.constexpr):
    """Return two normals from two words, negated if ``opposite``.

    The steps are those of csrc/keyed_loop.cpp, with factors of powers of two and signs moved to where they cost no instruction, which
    changes no bit.
    """
    large = a >= 0x80000000
    smaller = tl.where(large, a ^ 0xFFFFFFFF, a).to(tl.int32).to(tl.float32)
    f = tl.fma(smaller, -2.3283064365386963e-10, -1.1641532182693481e-10)  # 2^-32, 2^-33
    bits = f.to(tl.uint32, bitcast=True)
    mantissa = (bits & 0x807FFFFF) | 0x3F000000
    power = (bits - mantissa).to(tl.int32, bitcast=True).to(tl.float32)  # the exponent times 2^23
    f = tl.where(large, f, -1.0 - mantissa.to(tl.float32, bitcast=True))
    f2 = f * f
    even = tl.fma(-2.82909846, f2, -2.41743279)
    even = tl.fma(even, f2, -0.527382374)
    even = tl.fma(even, f2, -0.667264223)
    even = tl.fma(even, f2, -2.0)
    odd = tl.fma(-3.2791853, f2, -0.361906648)
    odd = tl.fma(odd, f2, 0.487365156)
    odd = tl.fma(odd, f2, 0.999990463)
    square = f * tl.fma(odd, f, even)
    square = tl.where(large, square, tl.fma(power, -1.38629436 / 8388608, square))
    if INTERPRETED:
        radius = tl.sqrt_rn(square)
    else:
        # What ptxas makes of sqrt.rn without its branch for small and large numbers: square is at least 2^-32.
        inverse = tl.rsqrt(square)
        root = square * inverse
        radius = tl.fma(tl.fma(root * -1.0, root, square), 0.5 * inverse, root)

    turn = 3.657295198e-10  # 2 pi / 2^34
    x = tl.fma((b << 2).to(tl.int32, bitcast=True).to(tl.float32), turn, 2 * turn)
    x2 = x * x
    sine = tl.fma(-0.000195152825, x2, 0.0083321603)
    sine = tl.fma(tl.fma(sine, x2, -0.166666552), x * x2, x)
    cosine = tl.fma(-0.00135918532, x2, 0.0416557789)
    cosine = tl.fma(tl.fma(cosine, x2, -0.499998838), x2, 1.0)
    quarter = b + 0x20000000 + (opposite.to(tl.uint32) << 31)  # its upper bits: quarter turns, and one half more if opposite
    signed = (radius.to(tl.uint32, bitcast=True) ^ (quarter & 0x80000000)).to(tl.float32, bitcast=True)
    swap = (quarter & 0x40000000) != 0
    return signed * tl.where(swap, sine * -1.0, cosine), signed * tl.where(swap, cosine, sine)


@triton.jit
def in_line(a, b, c, d):
    """Join four [TILE] into [TILE, 4], with the elements of a group in one thread."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def normals(group, c1, c2, c3, opposite, k0, k1, INTERPRETED: tl.constexpr):
    a, b, c, d = philox(group, c1, c2, c3, k0, k1, INTERPRETED)
    z0, z1 = box_muller(a, b, opposite, INTERPRETED)
    z2, z3 = box_muller(c, d, opposite, INTERPRETED)
    return in_line(z0, z1, z2, z3)


@triton.jit
def numbers(first, PART: tl.constexpr):
    """Return the numbers [PART] of the groups from ``first``, uint32, and those [PART, 4] of their elements, from 0."""
    groups = tl.arange(0, PART)
    return first.to(tl.uint32) + groups.to(tl.uint32), groups[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def places(x, first, element, e1, e2, s0, s1, s2, CONTIGUOUS: tl.constexpr):
    """Return pointers to row-major elements, counted from the group ``first``, of a strided row at ``x``."""
    if CONTIGUOUS:
        at = x + first * 4 + element
    else:
        element = first * 4 + element
        outer = element // e2
        at = x + (outer // e1).to(tl.int64) * s0 + (outer % e1).to(tl.int64) * s1 + (element % e2).to(tl.int64) * s2
    return at


@triton.jit
def store(at, value, inside, INTERPRETED: tl.constexpr):
    """Store, rounded to nearest even. Rounds to bfloat16 by hand in Triton 3.7's interpreter, which loses the carry."""
    if INTERPRETED and at.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        value = tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(at, value.to(at.dtype.element_ty), mask=inside)


@triton.jit
def normal_kernel(
    out, rows, stream, site, elements, tiles, ANTITHETIC: tl.constexpr, INTERPRETED: tl.constexpr, PART: tl.constexpr, REPEATS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row, first = program // tiles, (program % tiles * (PART * REPEATS)).to(elements.dtype)
    k0, k1 = philox_key(stream, site)
    c1, c2, c3, opposite = name_of(rows, row, ANTITHETIC)
    out += row * elements
    for _ in range(tl.minimum(REPEATS, (elements - 1 - first * 4) // (4 * PART) + 1)):
        group, element = numbers(first, PART)
        z = normals(group, c1, c2, c3, opposite, k0, k1, INTERPRETED)
        store(out + first * 4 + element, z, element < elements - first * 4, INTERPRETED)
        first += PART


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
    PART: tl.constexpr,
    REPEATS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = (program % tiles * PART).to(elements.dtype)
    share = program // tiles % shares
    n = program // tiles // shares
    k0, k1 = philox_key(stream, site)
    scale = tl.full((), sigma, tl.float64).to(ACC)
    group, element = numbers(first, PART)
    inside = element < elements - first * 4
    at = places(x + n * x_n, first, element, e1, e2, x_0, x_1, x_2, CONTIGUOUS)
    clean = tl.load(at, mask=inside, other=0.0).to(ACC)  # shared by the candidates of this program
    for b in range(share * REPEATS, tl.minimum((share + 1) * REPEATS, B)):
        row = n * B + b
        c1, c2, c3, opposite = name_of(rows, row, ANTITHETIC)
        z = normals(group, c1, c2, c3, opposite, k0, k1, INTERPRETED).to(ACC)
        store(out + row * elements + first * 4 + element, tl.fma(scale, z, clean), inside, INTERPRETED)


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
    PART: tl.constexpr,
    REPEATS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, first = program // tiles, (program % tiles * (PART * REPEATS)).to(elements.dtype)
    k0, k1 = philox_key(stream, site)
    factor = tl.full((), scale, tl.float64).to(ACC)
    c1, c2, c3, opposite = name_of(rows, row, ANTITHETIC)
    flip = tl.where(opposite, 0xFFFFFFFF, 0).to(tl.uint32)
    x += row * x_m
    out += row * elements
    for _ in range(tl.minimum(REPEATS, (elements - 1 - first * 4) // (4 * PART) + 1)):
        group, element = numbers(first, PART)
        inside = element < elements - first * 4
        at = places(x, first, element, e1, e2, x_0, x_1, x_2, CONTIGUOUS)
        kept = tl.load(at, mask=inside, other=0.0).to(ACC) * factor
        a, b, c, d = philox(group, c1, c2, c3, k0, k1, INTERPRETED)
        u = in_line(a, b, c, d)
        if ANTITHETIC:
            u ^= flip
        kept = tl.where(u >= tl.cast(threshold, tl.uint32), kept, 0.0)
        store(out + first * 4 + element, kept, inside, INTERPRETED)
        first += PART


def launch_normal(out, rows, stream, site, elements, antithetic):
    """Fill ``out`` [M, elements]. The arguments are those that ttcfast/ops/normal.py has checked."""
    if out.numel() == 0:
        return
    part, repeats, warps = pick_config(elements, rows.shape[0])
    tiles = ceil_div(elements, 4 * part * repeats)
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
        PART=part,
        REPEATS=repeats,
        num_warps=warps,
    )


def launch_add_noise(out, x, sizes, strides, B, sigma, rows, stream, site, elements, antithetic):
    """Fill ``out`` [N, B, elements] from x [N, three sizes]. The arguments are those that ttcfast/ops/add_noise.py has checked."""
    if out.numel() == 0:
        return
    part, repeats, warps = pick_config(elements, rows.shape[0], B)
    tiles, shares = ceil_div(elements, 4 * part), ceil_div(B, repeats)
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
        PART=part,
        REPEATS=repeats,
        num_warps=warps,
    )


def launch_keyed_dropout(out, x, sizes, strides, threshold, scale, rows, stream, site, elements, antithetic):
    """Fill ``out`` [M, elements] from x [M, three sizes]. The arguments are those that ttcfast/ops/keyed_dropout.py has checked."""
    if out.numel() == 0:
        return
    if threshold >= 2**32:  # larger than any draw
        out.zero_()
        return
    part, repeats, warps = pick_config(elements, rows.shape[0], groups=2)  # four spill in float64
    tiles = ceil_div(elements, 4 * part * repeats)
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
        PART=part,
        REPEATS=repeats,
        num_warps=warps,
    )


def interpreted():
    return isinstance(normal_kernel, InterpretedFunction)


def variants():
    """Return the variants to compile ahead of time: (name, kernel, signature, constants, warps, register limit).

    128 registers let four blocks of 128 threads share a multiprocessor, 168 three; nothing may spill. A pass of a thread is an iteration of
    its loop.
    """
    size = 65536, 4096
    for stored in ("fp32", "bf16", "fp64"):
        acc = tl.float64 if stored == "fp64" else tl.float32
        for kind, integer, aligned in (("", "i32", ":16"), (" antithetic strided", "i32", ""), (" antithetic 64-bit", "i64", "")):
            sizes = {"rows": "*i64:16", "stream": "*i64:16", "site": integer, "elements": integer + aligned, "tiles": integer}
            common = {"out": f"*{stored}{aligned}", **sizes}
            part, repeats, warps = pick_config(*size)
            fixed = {"ANTITHETIC": bool(kind), "INTERPRETED": False, "PART": part, "REPEATS": repeats}
            name = f"{stored}{kind}, 16 elements a pass"
            if "strided" not in kind:
                yield f"normal {name}", normal_kernel, common, fixed, warps, 128
            common = {**common, "x": f"*{stored}{aligned}", **dict.fromkeys(("e1", "e2", "x_0", "x_1", "x_2"), integer)}
            fixed = {**fixed, "CONTIGUOUS": "strided" not in kind, "ACC": acc}
            noise = {**common, "B": integer, "shares": integer, "sigma": "fp64", "x_n": integer + aligned}
            yield f"add_noise {name}", add_noise_kernel, noise, fixed, warps, 168 if kind else 128
            dropout = {**common, "threshold": "i64", "scale": "fp64", "x_m": integer + aligned}
            part, repeats, warps = pick_config(*size, groups=2)
            fixed = {**fixed, "PART": part, "REPEATS": repeats}
            yield f"keyed_dropout {stored}{kind}, 8 elements a pass", keyed_dropout_kernel, dropout, fixed, warps, 128
