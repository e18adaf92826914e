// Running sum and squared norm of many gradients in one pass. Plain structs and functions; the definition is
// accumulate_moments_ref in ttcfast/ops/accumulate_moments.py.
#pragma once

#include <cstdint>

namespace ttcfast {

enum class GradDType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

enum class MomentsSimd : int { generic = 0, avx2 = 1, avx512 = 2 };  // each includes those before it

// The widest that was compiled and that this processor has.
MomentsSimd best_moments_simd();

struct MomentsTensor {
    void* grad;
    void* total;  // null: nothing is accumulated
    int64_t count;
};

// All gradients have one dtype, all totals another: the same, or float32 under 16-bit gradients.
struct MomentsProblem {
    GradDType grad_dtype, total_dtype;
    bool zero_grads;
    const MomentsTensor* tensors;
    int64_t tensor_count;
    int threads;
    MomentsSimd simd;  // at most best_moments_simd()
};

// Adds each gradient to its total and returns the sum of all squares. The squares are taken and added in double (those of 32- and
// 16-bit numbers are exact there). The result is the same to the bit for every number of threads and every instruction set.
double accumulate_moments_cpu(const MomentsProblem& problem);

// One run of consecutive elements: the sum of their squares.
using MomentsRun = double (*)(void* grad, void* total, int64_t count);

struct MomentsVariant {
    GradDType grad, total;
    MomentsRun add, add_and_zero, measure, measure_and_zero;
};

constexpr int kMomentsVariants = 6;

const MomentsVariant* moments_generic();
#ifdef TTCFAST_X86
const MomentsVariant* moments_avx2();    // needs AVX2 and F16C
const MomentsVariant* moments_avx512();  // needs AVX-512F besides
#endif

}  // namespace ttcfast
