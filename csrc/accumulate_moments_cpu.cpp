#include <algorithm>
#include <vector>

#include "accumulate_moments.h"
#include "parallel.h"

namespace ttcfast {
namespace {

// Elements per work item. Partial sums are per item and added in order, so this, not the number of threads, fixes the result.
constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kSerialBelow = 1 << 17;  // elements below which waking a thread costs more than it saves

using Run = double (*)(void* grad, void* total, int64_t count, bool accumulate, bool zero);

Run run_for(const MomentsProblem& p) {
    Run run = nullptr;
    with_type<float, double, bfloat16, float16>(p.grad_dtype, [&](auto grad) {
        using G = decltype(grad);
        const auto set = [&](auto total) {
            run = at_level(p.level, [](auto level) -> Run { return &moments_run<G, decltype(total), level>; });
        };
        p.total_dtype == p.grad_dtype ? set(grad) : set(AccumulatorOf<G>());
    });
    return run;
}

std::vector<MomentsTensor> items_of(const MomentsProblem& p) {
    std::vector<MomentsTensor> items;
    for (const MomentsTensor* t = p.tensors; t != p.tensors + p.tensor_count; ++t) {
        for (int64_t start = 0; start < t->count; start += kChunk) {
            auto at = [start](void* base, DType dtype) { return base ? static_cast<char*>(base) + start * size_of(dtype) : nullptr; };
            items.push_back({at(t->grad, p.grad_dtype), at(t->total, p.total_dtype), std::min(kChunk, t->count - start)});
        }
    }
    return items;
}

}  // namespace

double accumulate_moments_cpu(const MomentsProblem& problem) {
    const std::vector<MomentsTensor> items = items_of(problem);
    const Run run = run_for(problem);
    int64_t elements = 0;
    for (const MomentsTensor& item : items) elements += item.count;
    std::vector<double> partials(items.size());
    parallel_for(static_cast<int64_t>(items.size()), elements < kSerialBelow ? 1 : problem.threads, [&](int64_t i, int) {
        const MomentsTensor& item = items[static_cast<size_t>(i)];
        partials[static_cast<size_t>(i)] = run(item.grad, item.total, item.count, item.total != nullptr, problem.zero_grads);
    });
    double result = 0;
    for (const double partial : partials) result += partial;
    return result;
}

}  // namespace ttcfast
