"""The Triton Philox by itself: counters in, words out. Apart from the tests, since Triton is optional and slow to import."""

import triton
import triton.language as tl

from ttcfast.kernels.keyed import philox


@triton.jit
def words_kernel(out, counters, n, key, INTERPRETED: tl.constexpr, TILE: tl.constexpr):
    i = tl.arange(0, TILE)
    inside = i < n
    c0 = tl.load(counters + i, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(counters + n + i, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(counters + 2 * n + i, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(counters + 3 * n + i, mask=inside, other=0).to(tl.uint32)
    k0 = tl.load(key).to(tl.uint32)
    k1 = tl.load(key + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1, INTERPRETED)
    tl.store(out + i, w0.to(tl.int64), mask=inside)
    tl.store(out + n + i, w1.to(tl.int64), mask=inside)
    tl.store(out + 2 * n + i, w2.to(tl.int64), mask=inside)
    tl.store(out + 3 * n + i, w3.to(tl.int64), mask=inside)
