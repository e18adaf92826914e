// The kernels of topk. Included by topk_cuda.cu and by tests/ops/topk_emulated.cpp, which runs them on the CPU, thread by thread.
//
// A row is narrowed down by histograms of 11 bits of the k-th best score, most significant first, until the scores above and inside the
// digits found so far fit into `room` places, counted before they are filled, or until no digit is left and position decides. The scores
// are then collected and sorted. Short rows take a warp each, others a block each, and long rows several blocks, the last of which to
// arrive does the work that needs all of them; the next kernel continues. No block ever waits for another one. Rows that are contiguous
// and aligned are read 16 bytes at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "topk_digits.h"
#include "topk_lanes.h"

namespace ttcfast {
namespace {

constexpr int kChunks = 2;            // of 16 bytes that a thread loads before it uses them
constexpr unsigned kMostRoom = 2048;  // places in shared memory
constexpr unsigned kWarpRow = 64;     // largest row for a warp
constexpr unsigned kMostParts = 256;  // blocks of a row
static_assert(kMostParts <= kThreads, "a thread of the last block looks at each part");

// Strides in elements; n < 2^30, so that a position and a step beyond it are an unsigned number.
struct Rows {
    unsigned n, k, room;  // k <= room <= kMostRoom
    int64_t count;        // of rows
    const void* scores;
    int64_t row_stride, column_stride;
    const int64_t* ids;
    int64_t id_row_stride, id_column_stride;
    void* values;  // [rows, k]
    int64_t* indices;
};

// Shared state of several blocks per row, for each row. The first two lines are zero at the start, and set back at the end.
struct Shared {
    Prefix* prefix;
    unsigned *bins, *arrived, *taken;  // [rows, kBins], [rows], [rows]
    unsigned* positions;               // [rows, room]
    unsigned *ties, *tied;             // of each block's share: how many scores are inside, and where: [rows, parts], [rows, parts, k]
    unsigned parts;
};

template <class T, bool named>
struct Row {
    using Key = typename Score<T>::Key;
    static constexpr int kRankBits = 8 * sizeof(Key);
    static constexpr unsigned kWide = 16 / sizeof(Key);
    using Rank = std::conditional_t<sizeof(Key) == 8, unsigned long long, unsigned>;
    // The ranks that have the digits of a prefix, in registers.
    struct Window {
        Rank low, high;
        unsigned long long name;
        int name_fixed;
    };
    const Key* scores;
    const int64_t* ids;
    int64_t stride, id_stride;
    bool wide;  // 16 bytes at a time
    Key* values;
    int64_t* indices;

    __device__ Row(const Rows& rows, int64_t row)
        : scores(static_cast<const Key*>(rows.scores) + row * rows.row_stride),
          ids(named ? rows.ids + row * rows.id_row_stride : nullptr),
          stride(rows.column_stride),
          id_stride(rows.id_column_stride),
          wide(stride == 1 && reinterpret_cast<uintptr_t>(scores) % 16 == 0),
          values(static_cast<Key*>(rows.values) + row * rows.k),
          indices(rows.indices + row * rows.k) {}

    __device__ Rank rank(unsigned i) const { return static_cast<Rank>(rank_of(key_of<T>(scores[i * stride]))); }
    __device__ unsigned long long name(unsigned i) const { return named ? name_of(ids[i * id_stride]) : 0; }

    // The position of a thread's score number v of the kThreads * kWide from `base` on, a multiple of kWide.
    __device__ unsigned at(unsigned base, unsigned v) const {
        return wide ? base + threadIdx.x * kWide + v : base + v * kThreads + threadIdx.x;
    }

    __device__ void load(unsigned base, unsigned last, Key (&keys)[kWide]) const {
        if (wide && at(base, kWide - 1) < last) {
            const uint4 raw = *reinterpret_cast<const uint4*>(scores + at(base, 0));
            memcpy(keys, &raw, sizeof raw);
            return;
        }
#pragma unroll
        for (unsigned v = 0; v < kWide; ++v) keys[v] = at(base, v) < last ? scores[at(base, v) * stride] : Key(0);
    }

    __device__ Window window(const Prefix& p) const {
        const int left = kRankBits - p.rank_fixed;
        const unsigned long long rest = left >= 64 ? ~0ull : (1ull << left) - 1;
        const unsigned long long low = left >= 64 ? 0 : p.rank << left;
        return {static_cast<Rank>(low), static_cast<Rank>(low | rest), p.name, named ? p.name_fixed : 0};
    }

    // 1 above, 0 inside, -1 below.
    __device__ int place(const Window& w, Rank rank, unsigned i) const {
        if (rank > w.high) return 1;
        if (rank < w.low) return -1;
        if (!named || w.name_fixed == 0) return 0;
        const unsigned long long digits = shifted(name(i), kNameBits - w.name_fixed);
        return digits == w.name ? 0 : digits > w.name ? 1 : -1;
    }

    __device__ void write(unsigned at, unsigned position) const {
        values[at] = scores[position * stride];
        indices[at] = named ? ids[position * id_stride] : static_cast<int64_t>(position);
    }
};

// The blocks' shared memory: first histograms, then scores to sort.
template <bool named>
union Scratch {
    unsigned bins[kBins];
    struct {
        unsigned long long rank[kMostRoom], name[named ? kMostRoom : 1];
        unsigned position[kMostRoom];
    } best;
};

// Calls use(position, whether it is before `last`, rank) for the scores [first, last) and some beyond, in any order; all lanes of a warp
// at once. `first` is a multiple of 16 bytes.
template <class T, bool named, class Use>
__device__ inline void visit(const Row<T, named>& row, unsigned first, unsigned last, const Use& use) {
    using R = Row<T, named>;
    constexpr unsigned step = kThreads * R::kWide;
    for (unsigned base = first; base < last; base += kChunks * step) {
        typename R::Key keys[kChunks][R::kWide];
#pragma unroll
        for (unsigned c = 0; c < kChunks; ++c) row.load(base + c * step, last, keys[c]);
#pragma unroll
        for (unsigned c = 0; c < kChunks; ++c) {
#pragma unroll
            for (unsigned v = 0; v < R::kWide; ++v) {
                const unsigned i = row.at(base + c * step, v);
                use(i, i < last, static_cast<typename R::Rank>(rank_of(key_of<T>(keys[c][v]))));
            }
        }
    }
}

// Adds the histogram of the next digit of the scores [first, last) inside the prefix to `bins` in shared memory.
template <class T, bool named>
__device__ void count_digits(const Row<T, named>& row, unsigned first, unsigned last, const Prefix& p, unsigned* bins) {
    using R = Row<T, named>;
    const Digit digit = next_digit(p, R::kRankBits);
    const unsigned mask = (1u << digit.bits) - 1;
    const typename R::Window window = row.window(p);
    visit(row, first, last, [&](unsigned i, bool real, typename R::Rank rank) {
        const bool inside = real && row.place(window, rank, i) == 0;
        unsigned value = 0;
        if (named && digit.of_name) {
            value = inside ? static_cast<unsigned>(row.name(i) >> digit.shift) : 0;
        } else {
            value = static_cast<unsigned>(rank >> digit.shift);
        }
        count(bins, inside, value & mask);
    });
}

// Fixes the next digit of `p`, in shared memory, from its complete histogram: that of the k-th best. All threads call it.
__device__ inline void descend(Prefix& p, int rank_bits, unsigned k, const unsigned* bins) {
    __shared__ unsigned warp_total[kWarps];
    constexpr unsigned own = kBins / kThreads;
    const Digit digit = next_digit(p, rank_bits);
    const unsigned wanted = k - p.above;  // from the top of what is inside, at least 1
    const unsigned top = kBins - 1 - own * threadIdx.x;
    unsigned mine = 0;
#pragma unroll
    for (unsigned j = 0; j < own; ++j) mine += bins[top - j];
    unsigned through = mine;  // of this warp, down to this thread's bins
    for (int step = 1; step < 32; step *= 2) {
        const unsigned higher = __shfl_up_sync(kAll, through, static_cast<unsigned>(step));
        if (static_cast<int>(lane_id()) >= step) through += higher;
    }
    if (lane_id() == 31) warp_total[threadIdx.x / 32] = through;
    __syncthreads();  // and every thread has read p
    for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) through += warp_total[warp];
    unsigned above = through - mine;
    if (above < wanted && wanted <= through) {
        unsigned bin = top;
        while (above + bins[bin] < wanted) above += bins[bin--];
        fix(p, digit, bin, above, bins[bin]);
    }
    __syncthreads();
}

// Writes the positions of the best among scores [first, last): all above the prefix, in any order, and all inside it if they fit.
// Otherwise those inside are ties, whose first, as many as the row may want, go to `tied` in order. Returns how many.
template <class T, bool named>
__device__ unsigned collect(const Row<T, named>& row, unsigned first, unsigned last, const Prefix& p, const Rows& rows, unsigned* taken,
                            unsigned* positions, unsigned* tied) {
    using R = Row<T, named>;
    const bool all = fits(p, rows.room);
    const typename R::Window window = row.window(p);
    visit(row, first, last, [&](unsigned i, bool real, typename R::Rank rank) {
        const int where = real ? row.place(window, rank, i) : -1;
        const bool wants = where > 0 || (where == 0 && all);
        const unsigned place = place_of(taken, wants);
        if (wants) positions[place] = i;
    });
    const unsigned wanted = rows.k - p.above;
    unsigned ties = 0;
    for (unsigned base = first; !all && base < last && ties < wanted; base += kThreads) {  // the same for the whole block
        const unsigned i = base + threadIdx.x;
        const bool tie = i < last && row.place(window, row.rank(i), i) == 0;
        const Standing s = standing(tie);
        if (tie && ties + s.before < wanted) tied[ties + s.before] = i;
        ties += s.total;
    }
    return ties < wanted ? ties : wanted;
}

// Sorts the scores at positions[0, count), readable by the whole block, and writes the first k.
template <class T, bool named>
__device__ void sort_and_write(const Row<T, named>& row, unsigned k, unsigned count, Scratch<named>& scratch) {
    auto& best = scratch.best;
    unsigned size = 2;
    while (size < count) size *= 2;
    for (unsigned t = threadIdx.x; t < size; t += kThreads) {
        const bool real = t < count;
        const unsigned position = real ? best.position[t] : kAll;
        best.rank[t] = real ? row.rank(position) : 0;  // below every rank: that of NaN is 1
        if (named) best.name[t] = real ? row.name(position) : 0;
        best.position[t] = position;
    }
    const auto before = [&](unsigned a, unsigned b) {
        if (best.rank[a] != best.rank[b]) return best.rank[a] > best.rank[b];
        if (named && best.name[a] != best.name[b]) return best.name[a] > best.name[b];
        return best.position[a] < best.position[b];
    };
    for (unsigned run = 2; run <= size; run *= 2) {
        for (unsigned apart = run / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (unsigned t = threadIdx.x; t < size / 2; t += kThreads) {
                const unsigned a = 2 * t - (t & (apart - 1)), b = a + apart;
                const bool best_first = (a & run) == 0;
                if (!(best_first ? before(b, a) : before(a, b))) continue;
                exchange(best.rank[a], best.rank[b]);
                if (named) exchange(best.name[a], best.name[b]);
                exchange(best.position[a], best.position[b]);
            }
        }
    }
    __syncthreads();
    for (unsigned t = threadIdx.x; t < k; t += kThreads) row.write(t, best.position[t]);
}

// True in the last block of the row to arrive, which then sees the other blocks' earlier writes. All threads call it, once.
__device__ inline bool last_to_arrive(unsigned* arrived, unsigned parts) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1u) == parts - 1;
        if (last) *arrived = 0;  // for the next kernel
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// A block's share of a row.
struct Part {
    int64_t row;
    unsigned number, first, last;

    __device__ Part(const Rows& rows, unsigned parts) : row(blockIdx.x / parts), number(blockIdx.x % parts) {
        const unsigned length = ((rows.n + parts - 1) / parts + 7) / 8 * 8;  // a multiple of 16 bytes
        first = number * length < rows.n ? number * length : rows.n;
        last = rows.n - first < length ? rows.n : first + length;
    }
};

// A warp per row of at most kWarpRow scores: each score counts the scores before it, which gives its place.
template <class T, bool named>
__global__ void __launch_bounds__(kThreads) topk_warp_kernel(Rows rows) {
    const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (number >= rows.count) return;  // the whole warp
    const Row<T, named> row(rows, number);
    constexpr int own = kWarpRow / 32;
    unsigned long long rank[own], name[own];
    unsigned before[own];
#pragma unroll
    for (int j = 0; j < own; ++j) {
        const unsigned i = lane_id() + 32 * j;
        rank[j] = i < rows.n ? row.rank(i) : 0;  // below every rank
        name[j] = i < rows.n ? row.name(i) : 0;
        before[j] = 0;
    }
#pragma unroll
    for (int other = 0; other < own; ++other) {
        for (int lane = 0; lane < 32; ++lane) {
            const unsigned long long their_rank = __shfl_sync(kAll, rank[other], lane);
            const unsigned long long their_name = named ? __shfl_sync(kAll, name[other], lane) : 0;
            const unsigned their_position = static_cast<unsigned>(lane) + 32 * other;
#pragma unroll
            for (int j = 0; j < own; ++j) {
                const unsigned position = lane_id() + 32 * j;
                const bool same_rank = their_rank == rank[j], same_name = their_name == name[j];
                before[j] += same_rank ? (same_name ? their_position < position : their_name > name[j]) : their_rank > rank[j];
            }
        }
    }
#pragma unroll
    for (int j = 0; j < own; ++j) {
        const unsigned i = lane_id() + 32 * j;
        if (i < rows.n && before[j] < rows.k) row.write(before[j], i);
    }
}

// A block per row.
template <class T, bool named>
__global__ void __launch_bounds__(kThreads, 2) topk_block_kernel(Rows rows) {
    __shared__ Scratch<named> scratch;
    __shared__ Prefix p;
    __shared__ unsigned taken;
    constexpr int rank_bits = Row<T, named>::kRankBits;
    const Row<T, named> row(rows, blockIdx.x);
    if (threadIdx.x == 0) {
        p = Prefix{};
        taken = 0;
    }
    __syncthreads();
    if (rows.n > rows.room) {
        while (!fits(p, rows.room) && !exhausted(p, rank_bits, named)) {
            for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) scratch.bins[bin] = 0;
            __syncthreads();
            count_digits(row, 0, rows.n, p, scratch.bins);
            __syncthreads();
            descend(p, rank_bits, rows.k, scratch.bins);
        }
        collect(row, 0, rows.n, p, rows, &taken, scratch.best.position, scratch.best.position + p.above);
    } else {
        for (unsigned i = threadIdx.x; i < rows.n; i += kThreads) scratch.best.position[i] = i;
    }
    __syncthreads();
    const unsigned count = rows.n <= rows.room ? rows.n : fits(p, rows.room) ? p.above + p.inside : rows.k;
    sort_and_write(row, rows.k, count, scratch);
}

// Several blocks per row, n > room. Fixes one more digit if needed; launched once for each possible digit.
template <class T, bool named>
__global__ void __launch_bounds__(kThreads, 2) topk_digit_kernel(Rows rows, Shared shared) {
    __shared__ unsigned bins[kBins];
    __shared__ Prefix p;
    constexpr int rank_bits = Row<T, named>::kRankBits;
    const Part part(rows, shared.parts);
    if (threadIdx.x == 0) p = shared.prefix[part.row];
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    if (fits(p, rows.room) || exhausted(p, rank_bits, named)) return;  // every block of the row
    count_digits(Row<T, named>(rows, part.row), part.first, part.last, p, bins);
    __syncthreads();
    unsigned* const sums = shared.bins + part.row * kBins;
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) {
        if (bins[bin] != 0) atomicAdd(&sums[bin], bins[bin]);
    }
    if (!last_to_arrive(shared.arrived + part.row, shared.parts)) return;
    for (unsigned bin = threadIdx.x; bin < kBins; bin += kThreads) {
        bins[bin] = __ldcg(&sums[bin]);
        sums[bin] = 0;  // for the next kernel
    }
    __syncthreads();
    descend(p, rank_bits, rows.k, bins);
    if (threadIdx.x == 0) shared.prefix[part.row] = p;
}

// The positions that the blocks of a row have collected, in shared memory; returns how many. All threads of the last block call it.
__device__ inline unsigned gather(const Prefix& p, const Rows& rows, const Shared& shared, int64_t row, unsigned* into) {
    __shared__ unsigned before[kMostParts];  // ties in the shares up to each block's
    const unsigned* const positions = shared.positions + row * rows.room;
    const bool all = fits(p, rows.room);
    const unsigned above = all ? p.above + p.inside : p.above;
    for (unsigned t = threadIdx.x; t < above; t += kThreads) into[t] = __ldcg(&positions[t]);
    if (all) return above;
    const unsigned* const ties = shared.ties + row * shared.parts;
    const unsigned* const tied = shared.tied + row * shared.parts * rows.k;
    const unsigned own = threadIdx.x < shared.parts ? __ldcg(&ties[threadIdx.x]) : 0;
    if (threadIdx.x < kMostParts) before[threadIdx.x] = own;
    for (unsigned step = 1; step < kMostParts; step *= 2) {
        __syncthreads();
        const unsigned lower = threadIdx.x >= step && threadIdx.x < kMostParts ? before[threadIdx.x - step] : 0;
        __syncthreads();
        if (threadIdx.x < kMostParts) before[threadIdx.x] += lower;
    }
    __syncthreads();
    for (unsigned t = threadIdx.x; t < rows.k - p.above; t += kThreads) {
        unsigned part = 0;  // the first whose shares up to its own hold more than t
        for (unsigned half = kMostParts / 2; half > 0; half /= 2) {
            if (before[part + half - 1] <= t) part += half;
        }
        into[p.above + t] = __ldcg(&tied[part * rows.k + t - (part > 0 ? before[part - 1] : 0)]);
    }
    return rows.k;
}

// Collects the positions of the best; the last block of a row sorts and writes them.
template <class T, bool named>
__global__ void __launch_bounds__(kThreads, 2) topk_collect_kernel(Rows rows, Shared shared) {
    __shared__ Scratch<named> scratch;
    const Part part(rows, shared.parts);
    const Prefix p = shared.prefix[part.row];
    const Row<T, named> row(rows, part.row);
    const int64_t number = part.row * shared.parts + part.number;
    unsigned* const taken = shared.taken + part.row;
    const unsigned ties =
        collect(row, part.first, part.last, p, rows, taken, shared.positions + part.row * rows.room, shared.tied + number * rows.k);
    if (threadIdx.x == 0) shared.ties[number] = ties;
    if (!last_to_arrive(shared.arrived + part.row, shared.parts)) return;
    if (threadIdx.x == 0) {  // for the next call
        shared.prefix[part.row] = Prefix{};
        *taken = 0;
    }
    const unsigned count = gather(p, rows, shared, part.row, scratch.best.position);
    __syncthreads();
    sort_and_write(row, rows.k, count, scratch);
}

}  // namespace
}  // namespace ttcfast
