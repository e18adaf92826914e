// The analytical reward of one step: per-candidate conservation residuals, boundary violation and positivity in one pass.
// Plain structs and functions; the definition is arm_ref in ttcfast/ops/arm_ref.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

enum class Momentum : int { sum = 0, components = 1, norm = 2 };

// A tensor [problem, candidate, channel, s0, s1, s2]; strides in elements, stride_b is 0 for the state.
struct ArmField {
    const void* data;
    int64_t stride_n, stride_b, stride_c;
    int64_t stride_s[3];
};

// "Accumulator" below is float for float32 and bfloat16 fields, double for float64 fields.
struct ArmProblem {
    DType dtype;
    int64_t problems, candidates, channels;
    int64_t extent[3];  // cells per axis; leading axes of lower-dimensional states are 1
    ArmField state, cand;

    const double* gamma;     // [problems]
    const void* volumes;     // accumulator [cells], or null: `volume` everywhere
    double volume;           // cell volume where `volumes` is null
    const uint8_t* mask;     // [cells], or null: no boundary term
    const void* values;      // accumulator [channels, cells], or null: `value` everywhere
    double value;            // prescribed boundary value where `values` is null
    const double* expected;  // [problems, components + 2], subtracted from the residuals, or null
    bool relative;           // relative residuals, over the state's integrals of abs(rho), of rho (abs(u) + sound speed), of abs(E)

    int density, energy, pressure;  // channels; -1 if absent
    int momentum[3], components;
    bool primitive;
    Momentum mode;
    double weights[5];  // mass, momentum, energy, boundary, positivity
    int threads;
    Level level;
};

// All [problems, candidates], row-major, except residuals [problems, candidates, components + 2].
struct ArmOutput {
    void *score, *mass, *momentum, *energy, *boundary, *positivity;  // accumulator
    uint8_t* finite;
    double* residuals;  // signed, unscaled: mass, momentum components, energy
};

// Results depend neither on `threads` or `level` nor on the other candidates of the call.
void arm_cpu(const ArmProblem& problem, const ArmOutput& output);

}  // namespace ttcfast
