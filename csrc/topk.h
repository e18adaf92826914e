// The k best scores of every row: larger first, equal ones by the smaller index or id, NaN last. Plain structs and functions; the
// definition is topk_ref in ttcfast/ops/topk.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// Strides in elements. Scores and ids are [rows, columns], any strides; values and indices [rows, k], row-major.
struct TopkProblem {
    DType dtype;
    int64_t rows, columns, k;  // 1 <= k <= columns
    const void* scores;
    int64_t row_stride, column_stride;
    const int64_t* ids;  // or null: positions are the ids
    int64_t id_row_stride, id_column_stride;
    void* values;
    int64_t* indices;
};

// The result does not depend on `threads` or `level`.
void topk_cpu(const TopkProblem& problem, int threads, Level level);

// On the current CUDA device; only if the extension is built with CUDA. Queues its work on `stream` without waiting, so a
// CUDA graph can capture it. k <= kMostCudaK, columns < kMostCudaColumns; rows times blocks per row < 2^31. `workspace` is device memory,
// aligned to 8 bytes, of at least topk_cuda_workspace bytes; it is needed until the work is done. Throws std::runtime_error.
constexpr int64_t kMostCudaK = 2048;
constexpr int64_t kMostCudaColumns = int64_t(1) << 30;
int64_t topk_cuda_workspace(int64_t rows, int64_t columns, int64_t k);
void topk_cuda(const TopkProblem& problem, void* workspace, void* stream);

}  // namespace ttcfast
