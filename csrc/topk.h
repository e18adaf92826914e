// The k best scores of every row: larger first, equal ones by the smaller index or id, NaN last. Plain structs and functions; the
// definition is topk_ref in ttcfast/ops/topk.py.
#pragma once

#include <cstdint>
#include <utility>

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
// CUDA graph can capture it. k <= kMostCudaK, columns < kMostCudaColumns; rows times blocks per row < 2^31. Both workspaces are device
// memory of at least the bytes that topk_cuda_workspaces returns, needed until the work is done. `zeroed`, aligned to 8 bytes, must be zero
// then and is zero again at the end. Throws std::runtime_error.
constexpr int64_t kMostCudaK = 2048;
constexpr int64_t kMostCudaColumns = int64_t(1) << 30;
std::pair<int64_t, int64_t> topk_cuda_workspaces(int64_t rows, int64_t columns, int64_t k);  // zeroed, scratch
void topk_cuda(const TopkProblem& problem, void* zeroed, void* scratch, void* stream);

}  // namespace ttcfast
