// Rows of a strided tensor as contiguous numbers of their own or the accumulator's type, read in place if possible.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"

namespace ttcfast {

struct Grid {
    int64_t extent[3];

    int64_t cells() const { return extent[0] * extent[1] * extent[2]; }

    bool contiguous(const int64_t (&stride)[3]) const {
        int64_t expected = 1;
        for (int axis = 2; axis >= 0; --axis) {
            if (extent[axis] != 1 && stride[axis] != expected) return false;
            expected *= extent[axis];
        }
        return true;
    }
};

// Cells [start, start + n) of the row-major grid at `base`: in place, or gathered and widened into `buffer`.
template <class T, class Acc>
const Acc* read_cells(const T* base, const Grid& grid, const int64_t (&stride)[3], bool contiguous, int64_t start, int64_t n, Acc* buffer) {
    const auto converted = [](T x) {
        if constexpr (std::is_same_v<T, Acc>)
            return x;
        else
            return widen(x);
    };
    if constexpr (std::is_same_v<T, Acc>) {
        if (contiguous) return base + start;
    }
    if (contiguous) {
        for (int64_t i = 0; i < n; ++i) buffer[i] = converted(base[start + i]);
        return buffer;
    }
    int64_t done = 0;
    while (done < n) {
        const int64_t cell = start + done;
        const int64_t column = cell % grid.extent[2];
        const int64_t row = cell / grid.extent[2] % grid.extent[1];
        const int64_t plane = cell / grid.extent[2] / grid.extent[1];
        const int64_t run = std::min(n - done, grid.extent[2] - column);
        const T* from = base + plane * stride[0] + row * stride[1] + column * stride[2];
        for (int64_t i = 0; i < run; ++i) buffer[done + i] = converted(from[i * stride[2]]);
        done += run;
    }
    return buffer;
}

}  // namespace ttcfast
