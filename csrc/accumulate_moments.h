// Running sum and squared norm of many gradients in one pass. Plain structs and functions; the definition is
// accumulate_moments_ref in ttcfast/ops/accumulate_moments.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

struct MomentsTensor {
    void* grad;
    void* total;  // null: no accumulation
    int64_t count;
};

// All gradients have one dtype, and all totals have one: the same, or float32 for 16-bit gradients.
struct MomentsProblem {
    DType grad_dtype, total_dtype;
    bool zero_grads;
    const MomentsTensor* tensors;
    int64_t tensor_count;
    int threads;
    Level level;
};

// Adds each gradient to its total and returns the sum of all squares, formed and added in double (exact for 32- and
// 16-bit numbers). The result is bitwise independent of the number of threads and the level.
double accumulate_moments_cpu(const MomentsProblem& problem);

// Returns the sum of the gradients' squares in a run of consecutive elements of types G and T. Compiled once per level.
template <class G, class T, Level level>
double moments_run(void* grad, void* total, int64_t count, bool accumulate, bool zero);

}  // namespace ttcfast
