// The loops over cells of arm_fields, compiled once per instruction set (level.h).
#include "arm_fields_loop.h"

#include "simd.h"

namespace ttcfast {
namespace {

// Lanes of a group, 64 bytes. Each lane is summed separately and the lanes are added in a fixed order at the end, so sums do not depend on
// the vector width.
template <class Acc>
constexpr int kLanes = 64 / static_cast<int>(sizeof(Acc));
template <class Acc>
constexpr int kParts = kLanes<Acc> / kWidth<Acc>;
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

// Calls work(cells, part) for every vector of whole groups, where load_from(pointer) reads that vector's cells. The cells after the last
// whole group are read from a copy padded with `filling`.
template <class Acc, bool summed, bool bounded>
void add_row_as(const FieldRow<Acc>& row, FieldSums& sums) {
    using V = Vector<Acc>;
    constexpr int width = kWidth<Acc>, lanes = kLanes<Acc>;
    V change[kParts<Acc>] = {}, outside[kParts<Acc>] = {};
    Bits<Acc> high{};
    const V low = splat<Acc>(row.low), upper = splat<Acc>(row.high);
    auto take = [&](const Acc* cells, const Acc* before, const Acc* volume) {
        unroll<kParts<Acc>>([&](auto p) {
            const V x = load(cells + p * width);
            high = maximum(high, magnitude<Acc>(x));
            if constexpr (summed) {
                const V d = before ? x - load(before + p * width) : x;
                change[p] += volume ? load(volume + p * width) * d : d;
            }
            if constexpr (bounded) outside[p] += above_zero<Acc>(low - x) + above_zero<Acc>(x - upper);
        });
    };
    const int64_t whole = row.count / lanes * lanes;
    for (int64_t i = 0; i < whole; i += lanes)
        take(row.cells + i, row.before ? row.before + i : nullptr, row.volume ? row.volume + i : nullptr);
    if (whole < row.count) {
        // The padding after the last cell changes nothing and is within the bounds.
        Acc cells[lanes], before[lanes] = {}, volume[lanes] = {};
        const Acc filling = row.low > 0 ? row.low : row.high < 0 ? row.high : Acc(0);
        for (int i = 0; i < lanes; ++i) {
            const bool there = whole + i < row.count;
            cells[i] = there ? row.cells[whole + i] : filling;
            before[i] = there && row.before ? row.before[whole + i] : Acc(0);
            volume[i] = there ? (row.volume ? row.volume[whole + i] : Acc(1)) : Acc(0);
        }
        take(cells, row.before ? before : nullptr, volume);
    }
    sums.change += total_of<Acc>(change);
    sums.outside += total_of<Acc>(outside);
    sums.bad |= any(exceeds<Acc>(high, kLargest<Acc>));
}

template <class Acc>
void add_row(const FieldRow<Acc>& row, FieldSums& sums) {
    if (row.summed)
        row.bounded ? add_row_as<Acc, true, true>(row, sums) : add_row_as<Acc, true, false>(row, sums);
    else
        row.bounded ? add_row_as<Acc, false, true>(row, sums) : add_row_as<Acc, false, false>(row, sums);
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
