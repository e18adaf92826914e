// The loop over cells of arm, compiled once per instruction set (level.h).
//
// Each block of cells is read from memory once. A quick test can prove that all its values are finite and no density or pressure is
// negative; only if it fails is the definition computed, on values that are in the L1 cache by then.
#include "arm_loop.h"

#include "simd.h"

namespace ttcfast {
namespace {

constexpr int64_t kBlock = 16;            // groups: 1 KiB per row, so that a block of state and candidate stays in the L1 cache
constexpr int kAhead = 1024;              // bytes, a block; hardware prefetching stops at page boundaries, and every row has its own pages
constexpr double kVelocityGuard = 1e-12;  // the TTC plan's compute_pressure divides by rho + 1e-12

template <class Acc>
constexpr int kParts = kLanes<Acc> / kWidth<Acc>;

// Bits of the largest finite number.
template <class Acc>
constexpr uint64_t kLargest = sizeof(Acc) == 4 ? 0x7f7fffffu : 0x7fefffffffffffffull;

// The quick test for conserved states. With g = 1e-12, the definition's kinetic energy is rho/2 sum (m_k / (rho + g))^2 <= |m|^2 / (2 rho).
// E rho >= (1 + margin) |m|^2 / 2 + tiny therefore makes the computed pressure >= 0, if
// margin covers the rounding errors of both sides: fewer than 20 of eps/2 each, and margin = 32 eps;
// 0 < rho, E <= limit = 2^40: (m / (rho + g))^2 <= E / (2 g) < 2^80 cannot overflow, and underflow adds at most 2^42 times
// the smallest subnormal to the kinetic energy, which is below tiny / rho >= tiny 2^-40 (float: 2^-107 against 2^-100).
// All of rho, m and E are then finite too, since E rho is.
template <class Acc>
struct Quick {
    static constexpr Acc half = sizeof(Acc) == 4 ? Acc(0.5 + 0x1p-19) : Acc(0.5 + 0x1p-48);
    static constexpr Acc tiny = sizeof(Acc) == 4 ? Acc(0x1p-60) : Acc(0x1p-600);
    static constexpr uint64_t limit = sizeof(Acc) == 4 ? 0x537fffffu : 0x426fffffffffffffull;  // bits of the number before 2^40

    // Maxima of bits as unsigned numbers: a sign bit or NaN exceeds every limit.
    Bits<Acc> high{}, margin{};

    template <int M>
    TTCFAST_INLINE void look(Vector<Acc> rho, const Vector<Acc> (&m)[M], Vector<Acc> energy) {
        Vector<Acc> square = m[0] * m[0];
        unroll<M - 1>([&](auto k) { square += m[k + 1] * m[k + 1]; });
        margin = maximum(margin, bits_of(rho * energy - (splat<Acc>(half) * square + splat<Acc>(tiny))));
        high = maximum(maximum(high, bits_of(rho)), bits_of(energy));
    }
    TTCFAST_INLINE bool sure() const { return !any(exceeds<Acc>(high, limit) | exceeds<Acc>(margin, kLargest<Acc>)); }
};

// For other gamma, a pressure >= 0 does not follow from E >= kinetic energy.
template <class Acc>
bool is_usual(Acc gamma) {
    return gamma - 1 >= 0 && gamma - 1 <= Acc(1e30);
}

template <class Acc>
struct Sums {
    alignas(64) Acc lane[kSums][kLanes<Acc>] = {};
};

template <class Acc>
using Parts = Vector<Acc>[kParts<Acc>];

template <class Acc>
TTCFAST_INLINE void take(Parts<Acc>& parts, const Acc* from) {
    unroll<kParts<Acc>>([&](auto p) { parts[p] = load(from + p * kWidth<Acc>); });
}

template <class Acc>
TTCFAST_INLINE void put(Acc* to, const Parts<Acc>& parts) {
    unroll<kParts<Acc>>([&](auto p) { store<Acc>(to + p * kWidth<Acc>, parts[p]); });
}

// A candidate's rows and its state from a given group on.
template <class T, int M>
struct Cursor {
    using Acc = AccumulatorOf<T>;
    const T *rho, *momentum[M], *energy, *pressure;
    const Acc *state, *volume;
};

constexpr bool is_conserved(Kind kind) { return kind == Kind::conserved || kind == Kind::conserved_with_pressure; }
constexpr bool has_energy(Kind kind) { return kind != Kind::primitive; }
constexpr bool has_pressure(Kind kind) { return kind != Kind::conserved; }

template <Kind kind, int M, class T>
Cursor<T, M> cursor_at(const CellGroups<T>& c, int64_t group) {
    using Acc = AccumulatorOf<T>;
    const int64_t cell = group * kLanes<Acc>;
    Cursor<T, M> at{c.rows[c.density] + cell, {}, nullptr, nullptr, c.state + (M + 2) * cell, c.volume + group * c.volume_step};
    for (int k = 0; k < M; ++k) at.momentum[k] = c.rows[c.momentum[k]] + cell;
    if (has_energy(kind)) at.energy = c.rows[c.energy] + cell;
    if (has_pressure(kind)) at.pressure = c.rows[c.pressure] + cell;
    return at;
}

// Adds the changes of `count` groups; returns true if the quick test proves that all values are finite and none negative.
template <Kind kind, int M, class T, class Acc>
bool add_changes(Sums<Acc>& sums, Cursor<T, M> at, int64_t volume_step, Acc gamma, int64_t count) {
    using V = Vector<Acc>;
    constexpr int width = kWidth<Acc>, lanes = kLanes<Acc>;
    Parts<Acc> mass, momentum[M], energy;
    take(mass, sums.lane[kMass]);
    unroll<M>([&](auto k) { take(momentum[k], sums.lane[kMomentum + k]); });
    take(energy, sums.lane[kEnergy]);
    Quick<Acc> quick;
    Bits<Acc> high{};  // maximum of bits: those of negative numbers, infinity and NaN exceed those of the largest number
    const V heat = splat<Acc>(gamma - 1);

    for (int64_t g = 0; g < count; ++g) {
        fetch<kAhead>(at.rho);
        for (int k = 0; k < M; ++k) fetch<kAhead>(at.momentum[k]);
        if constexpr (has_energy(kind)) fetch<kAhead>(at.energy);
        if constexpr (has_pressure(kind)) fetch<kAhead>(at.pressure);
        unroll<kParts<Acc>>([&](auto p) {
            constexpr int o = p * width;
            auto old = [&](int row) { return load(at.state + row * lanes + o); };
            const V rho = load(at.rho + o), d_rho = rho - old(0);
            V m[M], e, d_energy;
            const V volume = load(at.volume + o);
            unroll<M>([&](auto k) { m[k] = load(at.momentum[k] + o); });
            mass[p] += volume * d_rho;
            if constexpr (has_energy(kind)) {
                e = load(at.energy + o);
                d_energy = e - old(M + 1);
            }
            if constexpr (is_conserved(kind)) {
                unroll<M>([&](auto k) { momentum[k][p] += volume * (m[k] - old(1 + k)); });
            } else {
                // Differences of products, written so that each small factor is itself a difference: see docs/design/decisions.md ("Sums of
                // differences").
                V square{}, change{};
                unroll<M>([&](auto k) {
                    const V before = old(1 + k), dv = m[k] - before;
                    momentum[k][p] += volume * (rho * dv + before * d_rho);
                    square += m[k] * m[k];
                    change += dv * (m[k] + before);
                });
                if constexpr (!has_energy(kind)) {
                    d_energy = (load(at.pressure + o) - old(M + 1)) / heat + splat<Acc>(Acc(0.5)) * (square * d_rho + old(0) * change);
                }
            }
            energy[p] += volume * d_energy;

            if constexpr (kind == Kind::conserved) {
                quick.look(rho, m, e);
            } else {
                high = maximum(maximum(high, bits_of(rho)), bits_of(load(at.pressure + o)));
                unroll<M>([&](auto k) { high = maximum(high, magnitude<Acc>(m[k])); });
                if constexpr (has_energy(kind)) high = maximum(high, magnitude<Acc>(e));
            }
        });
        at.rho += lanes;
        unroll<M>([&](auto k) { at.momentum[k] += lanes; });
        if constexpr (has_energy(kind)) at.energy += lanes;
        if constexpr (has_pressure(kind)) at.pressure += lanes;
        at.state += (M + 2) * lanes;
        at.volume += volume_step;
    }

    put(sums.lane[kMass], mass);
    unroll<M>([&](auto k) { put(sums.lane[kMomentum + k], momentum[k]); });
    put(sums.lane[kEnergy], energy);
    return kind == Kind::conserved ? is_usual(gamma) && quick.sure() : !any(exceeds<Acc>(high, kLargest<Acc>));
}

// Pressure by the definition, from one vector of cells.
template <int M, class Acc>
TTCFAST_INLINE Vector<Acc> pressure_of(Vector<Acc> rho, const Vector<Acc> (&m)[M], Vector<Acc> energy, Acc gamma) {
    const Vector<Acc> per_mass = splat<Acc>(1) / (rho + splat<Acc>(Acc(kVelocityGuard)));
    Vector<Acc> square{};
    unroll<M>([&](auto k) {
        const Vector<Acc> v = m[k] * per_mass;
        square += v * v;
    });
    return splat<Acc>(gamma - 1) * (energy - splat<Acc>(Acc(0.5)) * rho * square);
}

// Tells whether any of these cells of one row is infinite or NaN.
template <class T>
bool any_not_finite(const T* row, int64_t count) {
    using Acc = AccumulatorOf<T>;
    Bits<Acc> high{};
    for (int64_t i = 0; i < count * kLanes<Acc>; i += kWidth<Acc>) high = maximum(high, magnitude<Acc>(load(row + i)));
    return any(exceeds<Acc>(high, kLargest<Acc>));
}

// Adds negative densities and pressures of `count` groups; returns false if all values are finite. A computed pressure is not if one of the
// numbers that it is computed from is not, since no division by infinity remains: infinite densities are multiplied by the 0 that they
// make.
template <Kind kind, int M, class T, class Acc>
bool add_negative(Sums<Acc>& sums, Cursor<T, M> at, Acc gamma, int64_t count) {
    using V = Vector<Acc>;
    constexpr int width = kWidth<Acc>;
    Parts<Acc> density, pressure;
    take(density, sums.lane[kDensity]);
    take(pressure, sums.lane[kPressure]);
    Bits<Acc> high{};
    for (int64_t g = 0; g < count; ++g) {
        const int64_t cell = g * kLanes<Acc>;
        fetch<kAhead>(at.rho + cell);  // memory keeps moving while this loop waits for divisions
        for (int k = 0; k < M; ++k) fetch<kAhead>(at.momentum[k] + cell);
        if constexpr (has_energy(kind)) fetch<kAhead>(at.energy + cell);
        if constexpr (has_pressure(kind)) fetch<kAhead>(at.pressure + cell);
        unroll<kParts<Acc>>([&](auto p) {
            const int64_t i = cell + p * width;
            const V rho = load(at.rho + i);
            V m[M], e, thermal;
            unroll<M>([&](auto k) { m[k] = load(at.momentum[k] + i); });
            if constexpr (has_energy(kind)) e = load(at.energy + i);
            if constexpr (has_pressure(kind)) {
                thermal = load(at.pressure + i);
                high = maximum(high, magnitude<Acc>(rho));
                unroll<M>([&](auto k) { high = maximum(high, magnitude<Acc>(m[k])); });
                if constexpr (has_energy(kind)) high = maximum(high, magnitude<Acc>(e));
            } else {
                thermal = pressure_of<M, Acc>(rho, m, e, gamma);
            }
            high = maximum(high, magnitude<Acc>(thermal));
            density[p] += below_zero<Acc>(rho);
            pressure[p] += below_zero<Acc>(thermal);
        });
    }
    put(sums.lane[kDensity], density);
    put(sums.lane[kPressure], pressure);
    bool bad = any(exceeds<Acc>(high, kLargest<Acc>));
    if constexpr (kind == Kind::conserved) {
        if (!bad) return false;
        bad = any_not_finite(at.rho, count) || any_not_finite(at.energy, count);
        for (int k = 0; k < M; ++k) bad |= any_not_finite(at.momentum[k], count);
    }
    return bad;
}

// Sums abs(candidate - value) over the masked slices from number `index` on before cell `end`; returns the next number.
template <class T, class Acc>
int64_t add_boundary(Sums<Acc>& sums, const CellGroups<T>& c, int64_t index, int64_t end) {
    using V = Vector<Acc>;
    constexpr int width = kWidth<Acc>;
    const MaskedSlices<Acc>& m = c.masked;
    for (; index < m.count && m.cells[index] - m.origin < end; ++index) {
        const int64_t cell = m.cells[index] - m.origin;
        Bits<Acc> mask;
        std::memcpy(&mask, m.masks + index * width, sizeof mask);
        V away{};
        if (m.values) {
            const Acc* values = m.values + index * c.channels * width;
            for (int k = 0; k < c.channels; ++k) away += from_bits<Acc>(bits_of(load(c.rows[k] + cell) - load(values + k * width)) & mask);
        } else {
            for (int k = 0; k < c.channels; ++k) away += from_bits<Acc>(bits_of(load(c.rows[k] + cell) - splat<Acc>(m.value)) & mask);
        }
        Acc* lane = sums.lane[kBoundary] + cell % kLanes<Acc>;
        store<Acc>(lane, load(lane) + away);
    }
    return index;
}

template <class Acc>
double total_of(const Acc (&lane)[kLanes<Acc>]) {
    double sum[kLanes<Acc>];
    for (int i = 0; i < kLanes<Acc>; ++i) sum[i] = static_cast<double>(lane[i]);
    for (int half = kLanes<Acc> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    return sum[0];
}

template <class T, Kind kind, int M>
void add_sums(const CellGroups<T>& c, CellSums& total) {
    using Acc = AccumulatorOf<T>;
    Sums<Acc> sums;
    int64_t masked = 0;
    for (int64_t first = 0; first < c.count; first += kBlock) {
        const int64_t count = c.count - first < kBlock ? c.count - first : kBlock;
        const Cursor<T, M> at = cursor_at<kind, M>(c, first);
        if (!add_changes<kind, M>(sums, at, c.volume_step, c.gamma, count)) total.bad |= add_negative<kind, M>(sums, at, c.gamma, count);
        for (int k = 0; k < c.other_channels; ++k) total.bad |= any_not_finite(c.rows[c.others[k]] + first * kLanes<Acc>, count);
        if (masked < c.masked.count) masked = add_boundary(sums, c, masked, (first + count) * kLanes<Acc>);
    }
    for (int k = 0; k < kSums; ++k) total.sums[k] += total_of<Acc>(sums.lane[k]);
}

// Adds the integrals of a state that scale relative residuals.
template <class Acc, Kind kind, int M>
void add_state(const CellGroups<Acc>& c, StateSums& total) {
    using V = Vector<Acc>;
    constexpr int width = kWidth<Acc>;
    const Cursor<Acc, M> at = cursor_at<kind, M>(c, 0);
    alignas(64) Acc mass[kLanes<Acc>] = {}, momentum[kLanes<Acc>] = {}, energy[kLanes<Acc>] = {};
    for (int64_t g = 0; g < c.count; ++g) {
        for (int lane = 0; lane < kLanes<Acc>; lane += width) {
            const int64_t i = g * kLanes<Acc> + lane;
            const V volume = load(at.volume + g * c.volume_step + lane), rho = load(at.rho + i), half = splat<Acc>(Acc(0.5));
            V m[M], square{};
            unroll<M>([&](auto k) {
                m[k] = load(at.momentum[k] + i);
                square += m[k] * m[k];
            });
            V e{}, p{};
            if constexpr (has_energy(kind)) e = load(at.energy + i);
            if constexpr (has_pressure(kind)) p = load(at.pressure + i);
            if constexpr (kind == Kind::conserved) p = pressure_of<M, Acc>(rho, m, e, c.gamma);
            if constexpr (kind == Kind::primitive) e = p / splat<Acc>(c.gamma - 1) + half * rho * square;
            if constexpr (!is_conserved(kind)) {
                square = V{};
                unroll<M>([&](auto k) { square += (rho * m[k]) * (rho * m[k]); });
            }
            const V sound = square_root(splat<Acc>(c.gamma) * above_zero<Acc>(p) * above_zero<Acc>(rho));  // rho c
            auto add = [&](Acc* lanes, V x) { store<Acc>(lanes + lane, load(lanes + lane) + volume * x); };
            add(mass, from_bits<Acc>(magnitude<Acc>(rho)));
            add(momentum, square_root(square) + sound);
            add(energy, from_bits<Acc>(magnitude<Acc>(e)));
        }
    }
    total.mass += total_of<Acc>(mass);
    total.momentum += total_of<Acc>(momentum);
    total.energy += total_of<Acc>(energy);
}

template <class T, Kind kind, int M>
void set_loop(CellLoop<T>& loop) {
    loop.add_sums = &add_sums<T, kind, M>;
    if constexpr (!std::is_same_v<T, bfloat16>) loop.add_state = &add_state<T, kind, M>;
}

template <class T, Kind kind>
void set_loop(CellLoop<T>& loop, int components) {
    if (components == 1) set_loop<T, kind, 1>(loop);
    if (components == 2) set_loop<T, kind, 2>(loop);
    if (components == 3) set_loop<T, kind, 3>(loop);
}

}  // namespace

template <class T, Level level>
CellLoop<T> cell_loop_of(Kind kind, int components) {
    CellLoop<T> loop{nullptr, nullptr, kWidth<AccumulatorOf<T>>};
    if (kind == Kind::conserved) set_loop<T, Kind::conserved>(loop, components);
    if constexpr (!std::is_same_v<T, bfloat16>) {
        if (kind == Kind::conserved_with_pressure) set_loop<T, Kind::conserved_with_pressure>(loop, components);
        if (kind == Kind::primitive) set_loop<T, Kind::primitive>(loop, components);
        if (kind == Kind::primitive_with_energy) set_loop<T, Kind::primitive_with_energy>(loop, components);
    }
    return loop;
}

template CellLoop<float> cell_loop_of<float, kLevel>(Kind, int);
template CellLoop<double> cell_loop_of<double, kLevel>(Kind, int);
template CellLoop<bfloat16> cell_loop_of<bfloat16, kLevel>(Kind, int);

}  // namespace ttcfast
