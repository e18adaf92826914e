#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "arm.h"
#include "field.h"
#include "parallel.h"

namespace ttcfast {
namespace {

// Cells per tile. Partial sums are per (problem, candidate, tile), so this and kLanes fix the order of every addition;
// neither may depend on the number of candidates or threads. Four channels of state and candidate take 128 KiB in float.
constexpr int64_t kTile = 4096;
constexpr int kLanes = 16;
constexpr int64_t kGroup = 16;             // candidates that share one packed state tile
constexpr int64_t kSerialBelow = 1 << 16;  // values under which starting a thread costs more than it saves
constexpr int kSums = 8;                   // mass, momentum x 3, energy, boundary, negative density, negative pressure
constexpr double kVelocityGuard = 1e-12;   // the seed's compute_pressure divides by rho + 1e-12

enum Sum { kMass, kMomentum, kEnergy = 4, kBoundary, kDensity, kPressure };

struct Partial {
    double sums[kSums];
    bool bad;
};

// What a state is made of; the arithmetic of a cell is compiled once for each.
enum class Kind { conserved, conserved_with_pressure, primitive, primitive_with_energy };

template <class Acc>
struct Channels {
    const Acc* rho;
    const Acc* mom[3];
    const Acc* energy;
    const Acc* pressure;
};

template <class Acc>
inline Acc below_zero(Acc x) {
    return x >= 0 ? Acc(0) : -x;  // NaN stays NaN
}

// One value per lane and sum; added lane by lane at the end, so the order is the same for every SIMD width.
template <class Acc>
struct Lanes {
    Acc value[kSums][kLanes] = {};

    double total(int sum) const {
        double result = 0;
        for (int lane = 0; lane < kLanes; ++lane) result += static_cast<double>(value[sum][lane]);
        return result;
    }
};

template <Kind kind, int M, class Acc>
inline void add_cell(Lanes<Acc>& lanes, int lane, const Channels<Acc>& u, const Channels<Acc>& s, const Acc* volume, Acc gamma, int64_t i) {
    const Acc w = volume ? volume[i] : Acc(1);
    const Acc rho = u.rho[i], d_rho = rho - s.rho[i];
    Acc d_energy, pressure;
    lanes.value[kMass][lane] += w * d_rho;
    if constexpr (kind == Kind::conserved || kind == Kind::conserved_with_pressure) {
        Acc square = 0;
        for (int k = 0; k < M; ++k) {
            const Acc m = u.mom[k][i], v = m / (rho + Acc(kVelocityGuard));
            lanes.value[kMomentum + k][lane] += w * (m - s.mom[k][i]);
            square += v * v;
        }
        d_energy = u.energy[i] - s.energy[i];
        pressure = kind == Kind::conserved ? (gamma - 1) * (u.energy[i] - Acc(0.5) * rho * square) : u.pressure[i];
    } else {
        // Differences of products, written so that each small factor is itself a difference (DECISIONS, Test-time computing 4).
        Acc square = 0, change = 0;
        for (int k = 0; k < M; ++k) {
            const Acc v = u.mom[k][i], old = s.mom[k][i], dv = v - old;
            lanes.value[kMomentum + k][lane] += w * (rho * dv + old * d_rho);
            square += v * v;
            change += dv * (v + old);
        }
        pressure = u.pressure[i];
        d_energy = kind == Kind::primitive_with_energy
                       ? u.energy[i] - s.energy[i]
                       : (pressure - s.pressure[i]) / (gamma - 1) + Acc(0.5) * (square * d_rho + s.rho[i] * change);
    }
    lanes.value[kEnergy][lane] += w * d_energy;
    lanes.value[kDensity][lane] += below_zero(rho);
    lanes.value[kPressure][lane] += below_zero(pressure);
}

template <Kind kind, int M, class Acc>
void add_cells(Lanes<Acc>& lanes, const Channels<Acc>& u, const Channels<Acc>& s, const Acc* volume, Acc gamma, int64_t n) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) add_cell<kind, M>(lanes, lane, u, s, volume, gamma, i + lane);
    }
    for (int lane = 0; i + lane < n; ++lane) add_cell<kind, M>(lanes, lane, u, s, volume, gamma, i + lane);
}

template <class Acc>
using AddCells = void (*)(Lanes<Acc>&, const Channels<Acc>&, const Channels<Acc>&, const Acc*, Acc, int64_t);

template <Kind kind, class Acc>
AddCells<Acc> for_components(int components) {
    return components == 1 ? &add_cells<kind, 1, Acc> : components == 2 ? &add_cells<kind, 2, Acc> : &add_cells<kind, 3, Acc>;
}

template <class Acc>
AddCells<Acc> arithmetic_of(const ArmProblem& p) {
    if (p.primitive) {
        return p.energy < 0 ? for_components<Kind::primitive, Acc>(p.components)
                            : for_components<Kind::primitive_with_energy, Acc>(p.components);
    }
    return p.pressure < 0 ? for_components<Kind::conserved, Acc>(p.components)
                          : for_components<Kind::conserved_with_pressure, Acc>(p.components);
}

template <class Acc>
bool any_not_finite(const Acc* row, int64_t n) {
    unsigned bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= not_finite(row[i]);
    return bad != 0;
}

template <class Acc>
void add_boundary(Lanes<Acc>& lanes, const Acc* row, const uint8_t* mask, const Acc* values, Acc value, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const Acc away = std::abs(row[i] - (values ? values[i] : value));
        lanes.value[kBoundary][i % kLanes] += mask[i] ? away : Acc(0);
    }
}

// Reads tiles of one problem's state and candidates and leaves partial sums. T is the stored type.
template <class T, class Acc>
class TileReader {
  public:
    explicit TileReader(const ArmProblem& p)
        : p_(p),
          grid_{{p.extent[0], p.extent[1], p.extent[2]}},
          state_contiguous_(grid_.contiguous(p.state.stride_s)),
          cand_contiguous_(grid_.contiguous(p.cand.stride_s)),
          add_cells_(arithmetic_of<Acc>(p)),
          row_(std::min(kTile, grid_.cells())),
          state_buffer_(static_cast<size_t>(p.channels * row_)),
          cand_buffer_(static_cast<size_t>(p.channels * row_)),
          state_rows_(static_cast<size_t>(p.channels)),
          cand_rows_(static_cast<size_t>(p.channels)) {}

    // Candidates [first, last) of problem n on one tile; partials points at the problem's [candidates, tiles].
    void run(int64_t n, int64_t first, int64_t last, int64_t tile, int64_t tiles, Partial* partials) {
        const int64_t start = tile * kTile, count = std::min(kTile, grid_.cells() - start);
        const Channels<Acc> state = read(p_.state, state_contiguous_, n, 0, start, count, state_buffer_, state_rows_);
        const uint8_t* mask = masked(start, count);
        for (int64_t b = first; b < last; ++b) {
            const Channels<Acc> cand = read(p_.cand, cand_contiguous_, n, b, start, count, cand_buffer_, cand_rows_);
            partials[b * tiles + tile] = sums(cand, state, n, start, count, mask);
        }
    }

  private:
    Partial sums(const Channels<Acc>& cand, const Channels<Acc>& state, int64_t n, int64_t start, int64_t count,
                 const uint8_t* mask) const {
        Lanes<Acc> lanes;
        Partial partial{};
        const Acc* values = static_cast<const Acc*>(p_.values);
        for (int64_t c = 0; c < p_.channels; ++c) {
            const Acc* row = cand_rows_[static_cast<size_t>(c)];
            partial.bad |= any_not_finite(row, count);
            if (mask) {
                add_boundary(lanes, row, mask, values ? values + c * grid_.cells() + start : nullptr, Acc(p_.value), count);
            }
        }
        const Acc* volume = p_.volumes ? static_cast<const Acc*>(p_.volumes) + start : nullptr;
        add_cells_(lanes, cand, state, volume, Acc(p_.gamma[n]), count);
        for (int k = 0; k < kSums; ++k) partial.sums[k] = lanes.total(k);
        return partial;
    }

    Channels<Acc> read(const ArmField& field, bool contiguous, int64_t n, int64_t b, int64_t start, int64_t count, std::vector<Acc>& buffer,
                       std::vector<const Acc*>& rows) const {
        const T* base = static_cast<const T*>(field.data) + n * field.stride_n + b * field.stride_b;
        for (int64_t c = 0; c < p_.channels; ++c) {
            rows[static_cast<size_t>(c)] =
                read_cells(base + c * field.stride_c, grid_, field.stride_s, contiguous, start, count, buffer.data() + c * row_);
        }
        auto row = [&](int c) { return c < 0 ? nullptr : rows[static_cast<size_t>(c)]; };
        Channels<Acc> named{row(p_.density), {}, row(p_.energy), row(p_.pressure)};
        for (int k = 0; k < p_.components; ++k) named.mom[k] = row(p_.momentum[k]);
        return named;
    }

    // The tile's part of the mask, or null where the tile holds no boundary cell: most tiles have none.
    const uint8_t* masked(int64_t start, int64_t count) const {
        if (!p_.mask) return nullptr;
        return std::any_of(p_.mask + start, p_.mask + start + count, [](uint8_t m) { return m != 0; }) ? p_.mask + start : nullptr;
    }

    const ArmProblem& p_;
    Grid grid_;
    bool state_contiguous_, cand_contiguous_;
    AddCells<Acc> add_cells_;
    int64_t row_;  // cells per channel in a buffer
    std::vector<Acc> state_buffer_, cand_buffer_;
    std::vector<const Acc*> state_rows_, cand_rows_;
};

double momentum_of(const double* residuals, int components, Momentum mode) {
    double result = 0;
    for (int k = 0; k < components; ++k) {
        const double r = residuals[k];
        result += mode == Momentum::sum ? r : mode == Momentum::components ? std::abs(r) : r * r;
    }
    return mode == Momentum::norm ? std::sqrt(result) : std::abs(result);
}

// Penalties and score of one candidate from its sums; non-finite candidates get infinite penalties.
template <class Acc>
void finish(const ArmProblem& p, const ArmOutput& out, int64_t n, int64_t at, const Partial& total, double boundary_values) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double cells = static_cast<double>(p.extent[0] * p.extent[1] * p.extent[2]);
    const double volume = p.volumes ? 1.0 : p.volume;
    double* residuals = out.residuals + at * (p.components + 2);
    residuals[0] = volume * total.sums[kMass];
    for (int k = 0; k < p.components; ++k) residuals[1 + k] = volume * total.sums[kMomentum + k];
    residuals[1 + p.components] = volume * total.sums[kEnergy];

    const double one[3] = {1, 1, 1};
    const double* scale = p.scales ? p.scales + 3 * n : one;
    double penalties[5] = {
        std::abs(residuals[0]) / scale[0],
        momentum_of(residuals + 1, p.components, p.mode) / scale[1],
        std::abs(residuals[1 + p.components]) / scale[2],
        boundary_values > 0 ? total.sums[kBoundary] / boundary_values : 0.0,
        (total.sums[kDensity] + total.sums[kPressure]) / cells,
    };
    double weighted = 0;
    void* fields[5] = {out.mass, out.momentum, out.energy, out.boundary, out.positivity};
    for (int k = 0; k < 5; ++k) {
        if (total.bad || std::isnan(penalties[k])) penalties[k] = infinity;
        weighted += p.weights[k] * penalties[k];
        static_cast<Acc*>(fields[k])[at] = static_cast<Acc>(penalties[k]);
    }
    static_cast<Acc*>(out.score)[at] = static_cast<Acc>(std::isfinite(weighted) ? -weighted : -infinity);
    out.finite[at] = !total.bad;
}

template <class T, class Acc>
void arm_typed(const ArmProblem& p, const ArmOutput& out) {
    const int64_t cells = p.extent[0] * p.extent[1] * p.extent[2];
    const int64_t tiles = (cells + kTile - 1) / kTile, groups = (p.candidates + kGroup - 1) / kGroup;
    const bool small = p.problems * p.candidates * p.channels * cells < kSerialBelow;
    const int64_t items = p.problems * tiles * groups;
    const int threads = small ? 1 : static_cast<int>(std::clamp<int64_t>(items, 1, std::max(p.threads, 1)));

    std::vector<Partial> partials(static_cast<size_t>(p.problems * p.candidates * tiles));
    std::vector<TileReader<T, Acc>> readers(static_cast<size_t>(threads), TileReader<T, Acc>(p));
    parallel_for(items, threads, [&](int64_t item, int worker) {
        const int64_t group = item % groups, tile = item / groups % tiles, n = item / groups / tiles;
        const int64_t first = group * kGroup, last = std::min(first + kGroup, p.candidates);
        readers[static_cast<size_t>(worker)].run(n, first, last, tile, tiles, partials.data() + n * p.candidates * tiles);
    });

    const int64_t masked = p.mask ? std::count_if(p.mask, p.mask + cells, [](uint8_t m) { return m != 0; }) : 0;
    for (int64_t at = 0; at < p.problems * p.candidates; ++at) {
        Partial total{};
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const Partial& partial = partials[static_cast<size_t>(at * tiles + tile)];
            for (int k = 0; k < kSums; ++k) total.sums[k] += partial.sums[k];
            total.bad |= partial.bad;
        }
        finish<Acc>(p, out, at / p.candidates, at, total, static_cast<double>(masked * p.channels));
    }
}

}  // namespace

void arm_cpu(const ArmProblem& problem, const ArmOutput& output) {
    switch (problem.dtype) {
        case DType::float32:
            return arm_typed<float, float>(problem, output);
        case DType::float64:
            return arm_typed<double, double>(problem, output);
        case DType::bfloat16:
            return arm_typed<bfloat16, float>(problem, output);
    }
}

}  // namespace ttcfast
