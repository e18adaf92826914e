#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "arm.h"
#include "arm_tile.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kSerialBelow = 1 << 19;  // values below which waking a thread costs more than it saves
constexpr double kScaleGuard = 1e-12;      // smallest denominator of a relative residual, times the domain's volume, as in arm_ref.py
constexpr int64_t kItems = 8;              // work items per thread, so that no thread waits long for the last one

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
void finish(const ArmProblem& p, const ArmOutput& out, const StateSums& scale, int64_t at, const CellSums& total, double boundary_values) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double cells = static_cast<double>(p.extent[0] * p.extent[1] * p.extent[2]);
    const double volume = p.volumes ? 1.0 : p.volume;
    double* residuals = out.residuals + at * (p.components + 2);
    residuals[0] = volume * total.sums[kMass];
    for (int k = 0; k < p.components; ++k) residuals[1 + k] = volume * total.sums[kMomentum + k];
    residuals[1 + p.components] = volume * total.sums[kEnergy];
    for (int k = 0; p.expected && k < p.components + 2; ++k) residuals[k] -= p.expected[at / p.candidates * (p.components + 2) + k];

    double penalties[5] = {
        std::abs(residuals[0]) / scale.mass,
        momentum_of(residuals + 1, p.components, p.mode) / scale.momentum,
        std::abs(residuals[1 + p.components]) / scale.energy,
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

template <class Acc>
double volume_of(const ArmProblem& p) {
    const int64_t cells = p.extent[0] * p.extent[1] * p.extent[2];
    const Acc* volumes = static_cast<const Acc*>(p.volumes);
    return volumes ? std::accumulate(volumes, volumes + cells, 0.0) : p.volume * static_cast<double>(cells);
}

// Denominators of a problem's residuals from the sums of its tiles; `whole` is the domain's volume.
StateSums scale_of(const ArmProblem& p, const StateSums* tiles, int64_t count, double whole) {
    StateSums total{};
    for (const StateSums* tile = tiles; tile < tiles + count; ++tile) {
        total.mass += tile->mass;
        total.momentum += tile->momentum;
        total.energy += tile->energy;
    }
    const double volume = p.volumes ? 1.0 : p.volume, least = kScaleGuard * whole;
    auto guarded = [&](double sum) { return volume * sum < least ? least : volume * sum; };  // propagates NaN
    return {guarded(total.mass), guarded(total.momentum), guarded(total.energy)};
}

template <class T>
CellLoop<T> loop_for(const ArmProblem& p) {
    return at_level(p.level, [&](auto level) { return cell_loop_of<T, level>(kind_of(p), p.components); });
}

template <class T>
void arm_typed(const ArmProblem& p, const ArmOutput& out) {
    using Acc = AccumulatorOf<T>;
    const int64_t cells = p.extent[0] * p.extent[1] * p.extent[2];
    const int64_t tiles = (cells + kTile - 1) / kTile, columns = p.problems * tiles;
    const int wanted = p.problems * p.candidates * p.channels * cells < kSerialBelow ? 1 : std::max(p.threads, 1);
    // Candidates that share one packed state tile; their number does not affect results.
    const int64_t shares = wanted == 1 ? 1 : (kItems * wanted + columns - 1) / std::max<int64_t>(columns, 1);
    const int64_t group = std::max<int64_t>((p.candidates + shares - 1) / shares, 1);
    const int64_t groups = (p.candidates + group - 1) / group, items = columns * groups;
    const int threads = static_cast<int>(std::clamp<int64_t>(items, 1, wanted));

    const CellLoop<T> in_place = loop_for<T>(p);
    const CellLoop<Acc> gathered = loop_for<Acc>(p);
    const Boundary<Acc> boundary(p, gathered.width);
    std::vector<StateSums> states(static_cast<size_t>(p.relative ? columns : 0));
    std::vector<CellSums> partials(static_cast<size_t>(p.problems * p.candidates * tiles));
    std::vector<TileReader<T, Acc>> readers;
    readers.reserve(static_cast<size_t>(threads));
    for (int k = 0; k < threads; ++k) readers.emplace_back(p, boundary, in_place, gathered);
    parallel_for(items, threads, [&](int64_t item, int worker) {
        const int64_t share = item % groups, tile = item / groups % tiles, n = item / groups / tiles;
        const int64_t first = share * group, last = std::min(first + group, p.candidates);
        StateSums* state = p.relative && share == 0 ? &states[static_cast<size_t>(n * tiles + tile)] : nullptr;
        readers[static_cast<size_t>(worker)].run(n, first, last, tile, tiles, partials.data() + n * p.candidates * tiles, state);
    });

    const double whole = volume_of<Acc>(p);
    StateSums scale{1, 1, 1};
    for (int64_t at = 0; at < p.problems * p.candidates; ++at) {
        if (p.relative && at % p.candidates == 0) scale = scale_of(p, states.data() + at / p.candidates * tiles, tiles, whole);
        CellSums total{};
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const CellSums& partial = partials[static_cast<size_t>(at * tiles + tile)];
            for (int k = 0; k < kSums; ++k) total.sums[k] += partial.sums[k];
            total.bad |= partial.bad;
        }
        finish<Acc>(p, out, scale, at, total, static_cast<double>(boundary.masked() * p.channels));
    }
}

}  // namespace

void arm_cpu(const ArmProblem& problem, const ArmOutput& output) {
    with_type<float, double, bfloat16>(problem.dtype, [&](auto zero) { arm_typed<decltype(zero)>(problem, output); });
}

}  // namespace ttcfast
