// The analytical reward of declared fields: per channel the change of its integral and its distance from bounds, and the divergence of
// vector fields. The definition is arm_fields_ref in ttcfast/ops/arm_fields_ref.py.
#pragma once

#include <cstdint>
#include <vector>

#include "arm.h"

namespace ttcfast {

// "Accumulator" as in arm.h. Vectors have one entry per channel unless stated otherwise.
struct FieldsProblem {
    DType dtype;
    int64_t problems, candidates, channels;
    int64_t extent[3];  // cells per axis; leading axes of lower-dimensional states are 1
    ArmField state, cand;

    const void* volumes;     // accumulator [cells], or null: `volume` everywhere
    double volume;           // cell volume where `volumes` is null
    const uint8_t* mask;     // [cells], or null: no boundary term
    const void* values;      // accumulator [channels, cells], or null: `value` everywhere
    double value;            // prescribed boundary value where `values` is null
    const double* expected;  // [problems, channels], subtracted from the changes, or null
    const double* units;     // [problems, quantities + 1], of the quantities' residuals and of the divergence; null: absolute

    std::vector<int64_t> groups;  // index of the channel's conserved quantity, -1 for none
    int64_t quantities;
    std::vector<int64_t> anchored;  // whether the integral's change is penalised, or the integral itself
    std::vector<double> low, high;
    std::vector<int64_t> vectors;   // [fields, dimensions], channels of the components
    std::vector<double> distances;  // [dimensions], cell spacings
    std::vector<int64_t> periodic;  // [dimensions]
    Momentum mode;
    std::vector<double> weights;  // [quantities + 3], the last three for boundary, bounds and divergence
    int threads;
    Level level;
};

// All [problems, candidates], row-major; penalties have a last axis [quantities + 3].
struct FieldsOutput {
    void *score, *penalties;  // accumulator
    uint8_t* finite;
};

// Results depend neither on `threads` or `level` nor on the other candidates of the call.
void arm_fields_cpu(const FieldsProblem& problem, const FieldsOutput& output);

}  // namespace ttcfast
