// The vector updates of Heun's and Euler's method and of their backward passes, each in one pass over memory.
// Plain structs and functions; the definition is heun_ref in ttcfast/ops/heun.py.
#pragma once

#include <cstdint>

namespace ttcfast {

// out = base + step * center(first + ratio * second), where center takes the mean of each `group` consecutive numbers out of them.
// All are contiguous runs of `count` floats, or doubles where `wide`.
struct HeunUpdate {
    bool wide;
    int64_t count;
    const void* base;  // null: 0
    const void* first;
    const void* second;  // null: left out
    double step, ratio;
    int64_t group;  // divides `count`; 0: nothing is taken out
    void* out;      // may be `base`
    int threads;
};

void heun_cpu(const HeunUpdate& update);

}  // namespace ttcfast
