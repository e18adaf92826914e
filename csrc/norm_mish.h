// y = mish(LayerNorm(x + rows + bias)) along rows, and its gradient. Plain structs and functions; the definition is norm_mish_ref in
// ttcfast/ops/norm_mish.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// All tensors are contiguous, float32 or float64.
struct NormMish {
    DType dtype;
    int64_t count, width;  // rows, numbers per row
    const void* x;         // [count, width]
    const void* rows;      // [count, width], or null
    const void* bias;      // [width]
    const void* scale;     // [width]
    const void* shift;     // [width]
    double eps;
    int threads;
    Level level;
};

// y [count, width]; stats [count, 2]: mean and reciprocal standard deviation of each row.
void norm_mish_cpu(const NormMish& p, void* y, void* stats);

// grad is the gradient of y [count, width]; grad_x [count, width] is also that of rows and, summed over rows, that of bias.
// y [count, width], or null; grad_scale and grad_shift [width], or both null.
void norm_mish_backward_cpu(const NormMish& p, const void* grad, const void* stats, void* grad_x, void* y, void* grad_scale,
                            void* grad_shift);

// A block of rows, in each direction compiled once per level.
template <class T>
struct NormMishLayer {
    int64_t width;
    const T *bias, *scale, *shift;
    T eps;
};

template <class T>
struct NormMishBlock {
    NormMishLayer<T> layer;
    int64_t count;
    const T *x, *rows, *grad;
    T *work, *y, *stats, *grad_x, *parameters;
};

template <class T, Level level>
void norm_mish_rows(const NormMishBlock<T>& b);
template <class T, Level level>
void norm_mish_rows_backward(const NormMishBlock<T>& b);

}  // namespace ttcfast
