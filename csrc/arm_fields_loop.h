// Plain data passed between the driver (arm_fields_cpu.cpp) and the loops over cells (arm_fields_loop.cpp); see level.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// Cells of one channel of a candidate, contiguous.
template <class Acc>
struct FieldRow {
    const Acc *cells, *before;  // `before` belongs to the state; null to sum the integral itself
    const Acc* volume;          // the cells' volumes, or null: 1
    int64_t count;
    bool summed, bounded;
    Acc low, high;
};

struct FieldSums {
    double change, outside;
    bool bad;  // a value is infinite or NaN
};

// Neighbours of a run of cells along each axis: component k's slope is (after - before) * per_distance.
template <class Acc>
struct Slopes {
    const Acc *after[3], *before[3];
    Acc per_distance[3];
    int components;
    int64_t count;
};

template <class Acc>
struct FieldLoops {
    void (*add_row)(const FieldRow<Acc>& row, FieldSums& sums);
    double (*divergence)(const Slopes<Acc>& slopes);  // sum over the cells of the absolute divergence
};

template <class Acc, Level level>
FieldLoops<Acc> field_loops();

}  // namespace ttcfast
