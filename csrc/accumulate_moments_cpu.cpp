#include <algorithm>
#include <vector>

#include "accumulate_moments_run.h"
#include "parallel.h"

namespace ttcfast {
namespace {

// Elements per work item. Partial sums are per item and are added in order, so this, and not the number of threads, fixes the result.
constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kSerialBelow = 1 << 17;  // elements under which starting a thread costs more than it saves

const MomentsVariant* variants_of(MomentsSimd simd) {
#ifdef TTCFAST_X86
    if (simd == MomentsSimd::avx512) return moments_avx512();
    if (simd == MomentsSimd::avx2) return moments_avx2();
#endif
    (void)simd;
    return moments_generic();
}

MomentsRun run_for(const MomentsProblem& p, bool accumulate) {
    const MomentsVariant* const variants = variants_of(p.simd);
    for (int k = 0; k < kMomentsVariants; ++k) {
        const MomentsVariant& v = variants[k];
        // Without totals their dtype says nothing, and the first entry of the gradient's dtype serves.
        if (v.grad != p.grad_dtype || (accumulate && v.total != p.total_dtype)) continue;
        return accumulate ? (p.zero_grads ? v.add_and_zero : v.add) : (p.zero_grads ? v.measure_and_zero : v.measure);
    }
    return nullptr;
}

int64_t size_of(GradDType dtype) { return dtype == GradDType::float32 ? 4 : dtype == GradDType::float64 ? 8 : 2; }

struct Item {
    void *grad, *total;
    int64_t count;
};

std::vector<Item> items_of(const MomentsProblem& p) {
    std::vector<Item> items;
    for (const MomentsTensor* t = p.tensors; t != p.tensors + p.tensor_count; ++t) {
        for (int64_t start = 0; start < t->count; start += kChunk) {
            auto at = [start](void* base, int64_t size) { return base ? static_cast<char*>(base) + start * size : nullptr; };
            items.push_back({at(t->grad, size_of(p.grad_dtype)), at(t->total, size_of(p.total_dtype)), std::min(kChunk, t->count - start)});
        }
    }
    return items;
}

}  // namespace

const MomentsVariant* moments_generic() { return kVariants; }

MomentsSimd best_moments_simd() {
#ifdef TTCFAST_X86
    // Every processor with AVX2 has F16C.
    if (__builtin_cpu_supports("avx512f")) return MomentsSimd::avx512;
    if (__builtin_cpu_supports("avx2")) return MomentsSimd::avx2;
#endif
    return MomentsSimd::generic;
}

double accumulate_moments_cpu(const MomentsProblem& problem) {
    const std::vector<Item> items = items_of(problem);
    if (items.empty()) return 0;
    const MomentsRun run = run_for(problem, items[0].total != nullptr);
    int64_t elements = 0;
    for (const Item& item : items) elements += item.count;
    std::vector<double> partials(items.size());
    parallel_for(static_cast<int64_t>(items.size()), elements < kSerialBelow ? 1 : problem.threads, [&](int64_t i, int) {
        const Item& item = items[static_cast<size_t>(i)];
        partials[static_cast<size_t>(i)] = run(item.grad, item.total, item.count);
    });
    double result = 0;
    for (const double partial : partials) result += partial;
    return result;
}

}  // namespace ttcfast
