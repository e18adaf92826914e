// Plain data passed between the driver (arm_cpu.cpp) and the loop over cells (arm_loop.cpp); see level.h.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

constexpr int kSums = 8;  // mass, momentum x 3, energy, boundary, negative density, negative pressure
enum Sum { kMass, kMomentum, kEnergy = 4, kBoundary, kDensity, kPressure };

// The variables of a state; the arithmetic of a cell is compiled once for each kind.
enum class Kind { conserved, conserved_with_pressure, primitive, primitive_with_energy };

// Lanes of a group: 64 bytes of the accumulator. Each lane of each sum is added separately and the lanes in a fixed order at the end,
// so sums do not depend on the vector width.
template <class Acc>
constexpr int kLanes = 64 / static_cast<int>(sizeof(Acc));

template <class Acc>
using MaskOf = std::conditional_t<sizeof(Acc) == 4, uint32_t, uint64_t>;

// Vectors (slices of a group) with at least one masked cell, in ascending order.
template <class Acc>
struct MaskedSlices {
    const int64_t* cells;  // number of each slice's first cell in the grid; `origin` is that of the first cell of the CellGroups
    int64_t count, origin;
    const MaskOf<Acc>* masks;  // [count, width] all bits but the sign if masked, otherwise none
    const Acc* values;         // [count, channels, width], or null: `value`
    Acc value;
};

// Whole groups of cells of one candidate and its state.
template <class T>
struct CellGroups {
    using Acc = AccumulatorOf<T>;
    int64_t count;
    const T* const* rows;                        // one per channel, at the first cell
    int density, momentum[3], energy, pressure;  // channels; -1 if absent
    const int* others;                           // the remaining channels
    int channels, other_channels;
    const Acc* state;   // [count, rows, lanes]: density, momenta, energy (pressure for kinds without energy)
    const Acc* volume;  // of the cells, advanced by `volume_step` for each group; a step of 0 repeats the first group's
    int64_t volume_step;
    Acc gamma;
    MaskedSlices<Acc> masked;
};

struct CellSums {
    double sums[kSums];
    bool bad;  // a value is infinite or NaN
};

// Integrals of the state that scale relative residuals.
struct StateSums {
    double mass, momentum, energy;  // of abs(rho), of abs(rho u) + rho c, of abs(E), where c is the speed of sound
};

template <class T>
struct CellLoop {
    void (*add_sums)(const CellGroups<T>& cells, CellSums& total);
    void (*add_state)(const CellGroups<T>& cells, StateSums& total);  // of a state: `rows` are its own, `state` is not read
    int width;                                                        // of its masked slices
};

// The loop for a kind of state with 1 to 3 momentum components. Functions that are null for bfloat16 work only on widened rows.
template <class T, Level level>
CellLoop<T> cell_loop_of(Kind kind, int components);

}  // namespace ttcfast
