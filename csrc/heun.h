// The vector updates of Heun's and Euler's method and of their backward passes, each in one pass over memory.
// Plain structs and functions; the definition is heun_ref in ttcfast/ops/heun.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// out = base + step * center(first + ratio * second), where center subtracts the mean of each `group` consecutive numbers.
// All are contiguous runs of `count` numbers, float32 or float64.
struct HeunUpdate {
    DType dtype;
    int64_t count;
    const void* base;  // null: 0
    const void* first;
    const void* second;  // null: omitted
    double step, ratio;
    int64_t group;  // divides `count`; 0: no means are subtracted
    void* out;      // may be `base`
    int threads;
    Level level;
};

void heun_cpu(const HeunUpdate& update);

// The same for a run of n numbers, compiled once per level.
template <class T>
struct HeunRun {
    const T *base, *first, *second;
    T step, ratio;
    T* out;
};

template <class T, Level level>
void heun_run(const HeunRun<T>& r, int64_t n, int64_t group);

}  // namespace ttcfast
