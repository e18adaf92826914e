// The loops over cells of arm_fields, compiled once per instruction set (level.h).
#include "arm_fields_loop.h"

#include "simd.h"

namespace ttcfast {
namespace {

// Lanes of a group, 64 bytes: each is added up by itself, and the lanes at the end in one order, so that the sums are the same for every
// width of vector.
template <class Acc>
constexpr int kLanes = 64 / static_cast<int>(sizeof(Acc));
template <class Acc>
constexpr int kParts = kLanes<Acc> / kWidth<Acc>;
constexpr int kAhead = 4096;  // bytes: one stream keeps memory as busy as torch.sum's only if it looks a page ahead
template <class Acc>
constexpr uint64_t kLargest = sizeof(Acc) == 4 ? 0x7f7fffffu : 0x7fefffffffffffffull;  // bits of the largest finite number

template <class Acc>
double total_of(const Vector<Acc> (&parts)[kParts<Acc>]) {
    Acc lane[kLanes<Acc>];
    unroll<kParts<Acc>>([&](auto p) { store<Acc>(lane + p * kWidth<Acc>, parts[p]); });
    double sum[kLanes<Acc>];
    for (int i = 0; i < kLanes<Acc>; ++i) sum[i] = static_cast<double>(lane[i]);
    for (int half = kLanes<Acc> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    return sum[0];
}

// The sums of one group of cells, added to registers.
template <class Acc, bool summed, bool anchored, bool weighted, bool bounded>
struct RowSums {
    using V = Vector<Acc>;
    V change[kParts<Acc>] = {}, outside[kParts<Acc>] = {};
    Bits<Acc> high{};

    TTCFAST_INLINE void take(const Acc* cells, const Acc* before, const Acc* volume, V low, V upper) {
        unroll<kParts<Acc>>([&](auto p) {
            constexpr int o = p * kWidth<Acc>;
            const V x = load(cells + o);
            high = maximum(high, magnitude<Acc>(x));
            if constexpr (summed) {
                V d = x;
                if constexpr (anchored) d = x - load(before + o);
                if constexpr (weighted) d = load(volume + o) * d;
                change[p] += d;
            }
            if constexpr (bounded) outside[p] += above_zero<Acc>(low - x) + above_zero<Acc>(x - upper);
        });
    }
};

template <class Acc, bool summed, bool anchored, bool weighted, bool bounded>
void add_row_as(const FieldRow<Acc>& row, FieldSums& sums) {
    constexpr int lanes = kLanes<Acc>;
    const Vector<Acc> low = splat<Acc>(row.low), upper = splat<Acc>(row.high);
    RowSums<Acc, summed, anchored, weighted, bounded> found;
    const int64_t whole = row.count / lanes * lanes;
    const Acc *cells = row.cells, *before = row.before, *volume = row.volume;
    for (int64_t i = 0; i < whole; i += lanes) {
        fetch<kAhead, 2>(cells + i);
        found.take(cells + i, anchored ? before + i : nullptr, weighted ? volume + i : nullptr, low, upper);
    }
    if (whole < row.count) {
        // What stands in for cells after the last one is 0, or within the bounds and then not summed up.
        Acc last[3][lanes] = {};
        const Acc filling = row.low > 0 ? row.low : row.high < 0 ? row.high : Acc(0);
        for (int i = 0; i < lanes; ++i) {
            const bool there = whole + i < row.count;
            last[0][i] = there ? cells[whole + i] : filling;
            last[1][i] = there ? (anchored ? before[whole + i] : Acc(0)) : anchored ? filling : Acc(0);
            last[2][i] = there ? (weighted ? volume[whole + i] : Acc(1)) : Acc(0);
        }
        RowSums<Acc, summed, anchored, true, bounded> rest;
        for (int p = 0; p < kParts<Acc>; ++p) rest.change[p] = found.change[p], rest.outside[p] = found.outside[p];
        rest.high = found.high;
        rest.take(last[0], last[1], last[2], low, upper);
        for (int p = 0; p < kParts<Acc>; ++p) found.change[p] = rest.change[p], found.outside[p] = rest.outside[p];
        found.high = rest.high;
    }
    sums.change += total_of<Acc>(found.change);
    sums.outside += total_of<Acc>(found.outside);
    sums.bad |= any(exceeds<Acc>(found.high, kLargest<Acc>));
}

// Calls take(std::true_type) or take(std::false_type).
template <class Take>
void with_flag(bool flag, const Take& take) {
    flag ? take(std::true_type()) : take(std::false_type());
}

template <class Acc>
void add_row(const FieldRow<Acc>& row, FieldSums& sums) {
    with_flag(row.bounded, [&](auto bounded) {
        if (!row.summed) return add_row_as<Acc, false, false, false, bounded>(row, sums);
        with_flag(row.before != nullptr, [&](auto anchored) {
            with_flag(row.volume != nullptr, [&](auto weighted) { add_row_as<Acc, true, anchored, weighted, bounded>(row, sums); });
        });
    });
}

template <class Acc, int components>
double divergence_as(const Slopes<Acc>& s) {
    using V = Vector<Acc>;
    constexpr int width = kWidth<Acc>, lanes = kLanes<Acc>;
    V sum[kParts<Acc>] = {};
    auto take = [&](const Acc* const(&after)[components], const Acc* const(&before)[components], int64_t i) {
        unroll<kParts<Acc>>([&](auto p) {
            V total{};
            unroll<components>([&](auto k) {
                total += (load(after[k] + i + p * width) - load(before[k] + i + p * width)) * splat<Acc>(s.per_distance[k]);
            });
            sum[p] += from_bits<Acc>(magnitude<Acc>(total));
        });
    };
    const Acc *after[components], *before[components];
    for (int k = 0; k < components; ++k) after[k] = s.after[k], before[k] = s.before[k];
    const int64_t whole = s.count / lanes * lanes;
    for (int64_t i = 0; i < whole; i += lanes) take(after, before, i);
    if (whole < s.count) {
        Acc last[2][components][lanes] = {};
        for (int k = 0; k < components; ++k) {
            for (int64_t i = whole; i < s.count; ++i) {
                last[0][k][i - whole] = s.after[k][i];
                last[1][k][i - whole] = s.before[k][i];
            }
            after[k] = last[0][k], before[k] = last[1][k];
        }
        take(after, before, 0);
    }
    return total_of<Acc>(sum);
}

template <class Acc>
double divergence(const Slopes<Acc>& slopes) {
    return slopes.components == 2 ? divergence_as<Acc, 2>(slopes) : divergence_as<Acc, 3>(slopes);
}

}  // namespace

template <class Acc, Level level>
FieldLoops<Acc> field_loops() {
    return {&add_row<Acc>, &divergence<Acc>};
}

template FieldLoops<float> field_loops<float, kLevel>();
template FieldLoops<double> field_loops<double, kLevel>();

}  // namespace ttcfast
