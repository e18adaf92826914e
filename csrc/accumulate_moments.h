// Running sum and squared norm of many gradients in one pass. Plain structs and functions; the definition is
// accumulate_moments_ref in ttcfast/ops/accumulate_moments.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

struct MomentsTensor {
    void* grad;
    void* total;  // null: nothing is accumulated
    int64_t count;
};

// All gradients have one dtype, all totals another: the same, or float32 under 16-bit gradients.
struct MomentsProblem {
    DType grad_dtype, total_dtype;
    bool zero_grads;
    const MomentsTensor* tensors;
    int64_t tensor_count;
    int threads;
    Level level;
};

// Adds each gradient to its total and returns the sum of all squares. The squares are taken and added in double (those of 32- and
// 16-bit numbers are exact there). The result is the same to the bit for every number of threads and every level.
double accumulate_moments_cpu(const MomentsProblem& problem);

// One run of consecutive elements of types G and T: returns the sum of the gradients' squares. Compiled once per level.
template <class G, class T, Level level>
double moments_run(void* grad, void* total, int64_t count, bool accumulate, bool zero);

}  // namespace ttcfast
