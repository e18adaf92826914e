// Work division and workspace layout of the CUDA implementation of topk. Shared by topk_cuda.cu and its emulated test.
#pragma once

#include <type_traits>

#include "topk.h"
#include "topk_kernels.h"

namespace ttcfast {
namespace {

constexpr int64_t kPerBlock = 1 << 12;  // scores that justify another block if there are few rows: eight a thread

struct Plan {
    unsigned room;
    int64_t parts;            // blocks per row
    int64_t zeroed, scratch;  // bytes of the two workspaces, 0 with one block per row
};

// Two blocks, as many as fit, for every multiprocessor if the rows are fewer and long enough.
inline Plan plan_of(int64_t rows, int64_t n, int64_t k, int64_t multiprocessors) {
    unsigned room = 256;  // twice k if shared memory allows it: one or two digits then suffice for most inputs
    while (room < kMostRoom && room < 2 * k) room *= 2;
    const int64_t blocks = rows < 2 * multiprocessors ? 2 * multiprocessors / (rows < 1 ? 1 : rows) : 1;
    int64_t parts = (n + kPerBlock - 1) / kPerBlock;
    parts = parts < blocks ? parts : blocks;
    parts = parts < kMostParts ? parts : kMostParts;
    if (parts < 2) return {room, 1, 0, 0};
    const int64_t zeroed = rows * (static_cast<int64_t>(sizeof(Prefix)) + 4 * (kBins + 2));
    return {room, parts, zeroed, 4 * rows * (room + parts * (1 + k))};
}

// In the order of Shared: prefixes need the alignment of the workspace's start.
inline Shared shared_in(void* zeroed, void* scratch, int64_t rows, const Plan& plan) {
    Shared s;
    s.prefix = static_cast<Prefix*>(zeroed);
    s.bins = reinterpret_cast<unsigned*>(s.prefix + rows);
    s.arrived = s.bins + rows * kBins;
    s.taken = s.arrived + rows;
    s.positions = static_cast<unsigned*>(scratch);
    s.ties = s.positions + rows * plan.room;
    s.tied = s.ties + rows * plan.parts;
    s.parts = static_cast<unsigned>(plan.parts);
    return s;
}

// Launches the plan: launch(kernel, blocks, arguments...).
template <class T, bool named, class Launch>
void run_plan(const Rows& rows, const Plan& plan, void* zeroed, void* scratch, const Launch& launch) {
    if (rows.n <= kWarpRow) {
        launch(topk_warp_kernel<T, named>, (rows.count + kWarps - 1) / kWarps, rows);
        return;
    }
    if (plan.parts == 1) {
        launch(topk_block_kernel<T, named>, rows.count, rows);
        return;
    }
    const Shared shared = shared_in(zeroed, scratch, rows.count, plan);
    const int64_t blocks = rows.count * plan.parts;
    for (int digit = most_digits(Row<T, named>::kRankBits, named); digit > 0; --digit) {
        launch(topk_digit_kernel<T, named>, blocks, rows, shared);
    }
    launch(topk_collect_kernel<T, named>, blocks, rows, shared);
}

template <class Launch>
void run_topk(const TopkProblem& p, const Plan& plan, void* zeroed, void* scratch, const Launch& launch) {
    const Rows rows{static_cast<unsigned>(p.columns),
                    static_cast<unsigned>(p.k),
                    plan.room,
                    p.rows,
                    p.scores,
                    p.row_stride,
                    p.column_stride,
                    p.ids,
                    p.id_row_stride,
                    p.id_column_stride,
                    p.values,
                    p.indices};
    const auto run = [&](auto score, auto named) {
        run_plan<decltype(score), decltype(named)::value>(rows, plan, zeroed, scratch, launch);
    };
    const auto typed = [&](auto score) { p.ids ? run(score, std::true_type()) : run(score, std::false_type()); };
    with_type<float, double, bfloat16, float16>(p.dtype, typed);
}

}  // namespace
}  // namespace ttcfast
