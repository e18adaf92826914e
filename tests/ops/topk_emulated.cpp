// The kernels and the plan of csrc/topk_cuda.cu on the CPU; built and called by test_topk_emulated.py.
#include <algorithm>
#include <numeric>
#include <random>

#include "cuda_emulated.h"
#include "topk_plan.h"

using namespace ttcfast;

// sizes: rows, columns, k. strides: of the scores and of the ids, row and column. Returns the blocks per row.
extern "C" int64_t topk_emulated(int dtype, const int64_t* sizes, const void* scores, const int64_t* strides, const int64_t* ids,
                                 void* values, int64_t* indices, int64_t multiprocessors, unsigned seed) {
    const TopkProblem problem{static_cast<DType>(dtype),
                              sizes[0],
                              sizes[1],
                              sizes[2],
                              scores,
                              strides[0],
                              strides[1],
                              ids,
                              strides[2],
                              strides[3],
                              values,
                              indices};
    const Plan plan = plan_of(sizes[0], sizes[1], sizes[2], multiprocessors);
    constexpr uint64_t mark = 0xababababababababull;
    std::vector<uint64_t> zeroed(static_cast<size_t>(plan.zeroed / 8 + 2), 0), scratch(static_cast<size_t>(plan.scratch / 8 + 2), mark);
    std::mt19937 random(seed);
    const auto launch = [&](auto kernel, int64_t blocks, auto... arguments) {
        std::vector<unsigned> order(static_cast<size_t>(blocks));
        std::iota(order.begin(), order.end(), 0u);
        std::shuffle(order.begin(), order.end(), random);
        for (unsigned number : order) emulated::run_block(number, kThreads, [&] { kernel(arguments...); });
    };
    for (int64_t call = plan.parts > 1 ? 2 : 1; call > 0; --call) {  // the second finds what the first leaves
        std::fill_n(static_cast<char*>(values), sizes[0] * sizes[2], 0x55);
        std::fill_n(indices, sizes[0] * sizes[2], -1);
        run_topk(problem, plan, zeroed.data(), scratch.data(), launch);
        if (std::any_of(zeroed.begin(), zeroed.end(), [](uint64_t x) { return x != 0; })) return -2;
    }
    if (plan.scratch % 8 == 0 && scratch[static_cast<size_t>(plan.scratch / 8)] != mark) return -1;  // written beyond its end
    return plan.parts;
}
