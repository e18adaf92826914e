// Cooperation among the lanes of a warp and the threads of a block in the kernels of topk.
#pragma once

namespace ttcfast {
namespace {

constexpr int kThreads = 512;  // of a block
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ inline unsigned lane_id() { return threadIdx.x % 32; }
__device__ inline unsigned lower_lanes() { return (1u << lane_id()) - 1; }

// Adds one to bin `digit` for every participating lane. Lanes that agree with the first one are added at once: equal scores would
// otherwise wait for each other 32 times. All lanes of the warp call it.
__device__ inline void count(unsigned* bins, bool takes_part, unsigned digit) {
    const unsigned mask = __ballot_sync(kAll, takes_part);
    if (mask == 0) return;
    const unsigned leader = __ffs(static_cast<int>(mask)) - 1;
    const unsigned common = __shfl_sync(kAll, digit, static_cast<int>(leader));
    const unsigned same = __ballot_sync(kAll, takes_part && digit == common);
    if (lane_id() == leader) {
        atomicAdd(&bins[common], static_cast<unsigned>(__popc(same)));
    } else if (takes_part && digit != common) {
        atomicAdd(&bins[digit], 1u);
    }
}

// Takes another place of `taken` for every lane that wants one; returns its number. All lanes of the warp call it.
__device__ inline unsigned place_of(unsigned* taken, bool wants) {
    const unsigned mask = __ballot_sync(kAll, wants);
    if (mask == 0) return 0;
    const unsigned leader = __ffs(static_cast<int>(mask)) - 1;
    unsigned start = 0;
    if (lane_id() == leader) start = atomicAdd(taken, static_cast<unsigned>(__popc(mask)));
    start = __shfl_sync(kAll, start, static_cast<int>(leader));
    return start + static_cast<unsigned>(__popc(mask & lower_lanes()));
}

// Counts the threads of lower number in the block that vote yes, and all that do. All threads call it.
struct Standing {
    unsigned before, total;
};
__device__ inline Standing standing(bool yes) {
    __shared__ unsigned warp_yes[kWarps];
    const unsigned mask = __ballot_sync(kAll, yes);
    if (lane_id() == 0) warp_yes[threadIdx.x / 32] = static_cast<unsigned>(__popc(mask));
    __syncthreads();
    Standing s{static_cast<unsigned>(__popc(mask & lower_lanes())), 0};
    for (unsigned warp = 0; warp < kWarps; ++warp) {
        if (warp < threadIdx.x / 32) s.before += warp_yes[warp];
        s.total += warp_yes[warp];
    }
    __syncthreads();
    return s;
}

template <class V>
__device__ inline void exchange(V& a, V& b) {
    const V kept = a;
    a = b;
    b = kept;
}

}  // namespace
}  // namespace ttcfast
