#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "arm_fields.h"
#include "arm_fields_loop.h"
#include "field.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kSerialBelow = 1 << 19;  // values below which waking a thread costs more than it saves
constexpr int64_t kTile = 4096;            // cells that one sum in the accumulator's precision covers
constexpr int64_t kStrip = 1 << 18;        // bytes of the state that stay in the L2 cache, tiles that are read one after another
constexpr int64_t kItems = 8;              // work items per thread, so that no thread waits long for the last one

// Sums of a candidate's tile: per channel, and over all channels.
struct TileSums {
    double* change;  // [channels]
    double outside, away;
    bool bad;
};

template <class T>
class FieldReader {
    using Acc = AccumulatorOf<T>;

  public:
    FieldReader(const FieldsProblem& p, const FieldLoops<Acc>& loops)
        : p_(p),
          loops_(loops),
          grid_{{p.extent[0], p.extent[1], p.extent[2]}},
          state_contiguous_(grid_.contiguous(p.state.stride_s)),
          cand_contiguous_(grid_.contiguous(p.cand.stride_s)),
          strip_(std::min(tiles_of_strip(p) * kTile, grid_.cells())),
          before_(static_cast<size_t>(p.channels * strip_)),
          cells_(static_cast<size_t>(std::min(kTile, grid_.cells()))),
          rows_(static_cast<size_t>(p.channels), before_.data()) {
        const int64_t row = p.extent[2] + 2;
        if (!p.vectors.empty()) lines_.resize(static_cast<size_t>(2 * 3 * row));
    }

    static int64_t tiles_of_strip(const FieldsProblem& p) {
        return std::max<int64_t>(kStrip / (kTile * p.channels * static_cast<int64_t>(sizeof(Acc))), 1);
    }

    // Adds candidates [first, last) of problem n in the strip from cell `start` on to sums[candidate, tile], of `tiles` each. A channel is
    // read from end to end, so that memory sees one stream.
    void run(int64_t n, int64_t first, int64_t last, int64_t start, int64_t tiles, TileSums* sums) {
        const int64_t end = std::min(start + strip_, grid_.cells());
        const T* state = static_cast<const T*>(p_.state.data) + n * p_.state.stride_n;
        for (int64_t c = 0; c < p_.channels; ++c) {
            if (p_.groups[static_cast<size_t>(c)] < 0) continue;
            rows_[static_cast<size_t>(c)] = read_cells(state + c * p_.state.stride_c, grid_, p_.state.stride_s, state_contiguous_, start,
                                                       end - start, before_.data() + c * strip_);
        }
        for (int64_t b = first; b < last; ++b) {
            const T* base = candidate(n, b);
            for (int64_t c = 0; c < p_.channels; ++c) {
                for (int64_t from = start; from < end; from += kTile) {
                    add(base, c, from, std::min(kTile, end - from), rows_[static_cast<size_t>(c)] + (from - start),
                        sums[b * tiles + from / kTile]);
                }
            }
        }
    }

    // Sum over cells of the absolute divergence of candidate b of problem n.
    double divergence(int64_t n, int64_t b) {
        const int d = static_cast<int>(p_.distances.size());
        double total = 0;
        for (size_t f = 0; f < p_.vectors.size(); f += static_cast<size_t>(d)) {
            for (int64_t i = 0; i < p_.extent[0]; ++i) {
                for (int64_t j = 0; j < p_.extent[1]; ++j) total += line(candidate(n, b), p_.vectors.data() + f, d, i, j);
            }
        }
        return total;
    }

  private:
    // Adds `count` cells of channel c from cell `start` on; `before` are those of the state.
    void add(const T* base, int64_t c, int64_t start, int64_t count, const Acc* before, TileSums& sums) {
        const size_t at = static_cast<size_t>(c);
        const Acc* cells = read_cells(base + c * p_.cand.stride_c, grid_, p_.cand.stride_s, cand_contiguous_, start, count, cells_.data());
        const FieldRow<Acc> row{cells,
                                p_.anchored[at] ? before : nullptr,
                                volumes(start),
                                count,
                                p_.groups[at] >= 0,
                                std::isfinite(p_.low[at]) || std::isfinite(p_.high[at]),
                                static_cast<Acc>(p_.low[at]),
                                static_cast<Acc>(p_.high[at])};
        FieldSums found{};
        loops_.add_row(row, found);
        sums.change[c] = found.change;
        sums.outside += found.outside;
        sums.bad |= found.bad;
        if (p_.mask) sums.away += away(cells, c, start, count);
    }

    const T* candidate(int64_t n, int64_t b) const {
        return static_cast<const T*>(p_.cand.data) + n * p_.cand.stride_n + b * p_.cand.stride_b;
    }

    const Acc* volumes(int64_t start) const { return p_.volumes ? static_cast<const Acc*>(p_.volumes) + start : nullptr; }

    double away(const Acc* cells, int64_t c, int64_t start, int64_t count) const {
        const Acc* values = p_.values ? static_cast<const Acc*>(p_.values) + c * grid_.cells() + start : nullptr;
        double total = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (p_.mask[start + i]) total += std::abs(cells[i] - (values ? values[i] : static_cast<Acc>(p_.value)));
        }
        return total;
    }

    // The line (i, j) along the last axis of a vector field whose component `k` is channel channels[k].
    double line(const T* base, const int64_t* channels, int d, int64_t i, int64_t j) {
        const int64_t n = p_.extent[2], row = n + 2, at[3] = {i, j, 0};
        Slopes<Acc> slopes{};
        slopes.components = d;
        slopes.count = n;
        int64_t skipped = 0;
        for (int k = 0; k < d; ++k) {
            const int axis = 3 - d + k;
            const bool wraps = p_.periodic[static_cast<size_t>(k)];
            slopes.per_distance[k] = static_cast<Acc>(0.5 / p_.distances[static_cast<size_t>(k)]);
            Acc* line = lines_.data() + 2 * k * row;
            const T* channel = base + channels[k] * p_.cand.stride_c;
            if (axis == 2) {  // one line, with the neighbouring cells at its ends
                const int64_t start = (i * p_.extent[1] + j) * n;
                const Acc* cells = read_cells(channel, grid_, p_.cand.stride_s, cand_contiguous_, start, n, line + row);
                std::copy_n(cells, n, line + 1);
                line[0] = cells[n - 1];
                line[n + 1] = cells[0];
                slopes.before[k] = line;
                slopes.after[k] = line + 2;
                skipped = wraps ? 0 : 1;
                continue;
            }
            const int64_t size = p_.extent[axis];
            if (!wraps && (at[axis] == 0 || at[axis] == size - 1)) return 0;
            for (int side = 0; side < 2; ++side) {
                int64_t there[3] = {i, j, 0};
                there[axis] = (at[axis] + (side ? 1 : size - 1)) % size;
                const int64_t start = (there[0] * p_.extent[1] + there[1]) * n;
                const Acc* cells = read_cells(channel, grid_, p_.cand.stride_s, cand_contiguous_, start, n, line + side * row);
                (side ? slopes.after : slopes.before)[k] = cells;
            }
        }
        slopes.count -= 2 * skipped;
        if (slopes.count <= 0) return 0;
        for (int k = 0; k < d; ++k) slopes.after[k] += skipped, slopes.before[k] += skipped;
        return loops_.divergence(slopes);
    }

    const FieldsProblem& p_;
    FieldLoops<Acc> loops_;
    Grid grid_;
    bool state_contiguous_, cand_contiguous_;
    int64_t strip_;
    std::vector<Acc> before_, cells_, lines_;
    std::vector<const Acc*> rows_;
};

double combined(Momentum mode, const FieldsProblem& p, const double* residuals, int64_t quantity) {
    double result = 0;
    for (size_t c = 0; c < p.groups.size(); ++c) {
        if (p.groups[c] != quantity) continue;
        const double r = residuals[c];
        result += mode == Momentum::sum ? r : mode == Momentum::components ? std::abs(r) : r * r;
    }
    return mode == Momentum::norm ? std::sqrt(result) : std::abs(result);
}

template <class T>
void run_typed(const FieldsProblem& p, const FieldsOutput& out) {
    using Acc = AccumulatorOf<T>;
    const int64_t cells = p.extent[0] * p.extent[1] * p.extent[2], pairs = p.problems * p.candidates;
    const int64_t tiles = (cells + kTile - 1) / kTile, strip = FieldReader<T>::tiles_of_strip(p), strips = (tiles + strip - 1) / strip;
    const int64_t columns = p.problems * strips;
    const int wanted = pairs * p.channels * cells < kSerialBelow ? 1 : std::max(p.threads, 1);
    const int64_t shares =
        wanted == 1 ? 1 : std::clamp<int64_t>((kItems * wanted + columns - 1) / std::max<int64_t>(columns, 1), 1, p.candidates);
    const int64_t group = (p.candidates + shares - 1) / shares, groups = (p.candidates + group - 1) / group;
    const int64_t summing = columns * groups, items = summing + (p.vectors.empty() ? 0 : pairs);

    const FieldLoops<Acc> loops = at_level(p.level, [](auto level) { return field_loops<Acc, level>(); });
    std::vector<FieldReader<T>> readers;
    const int threads = static_cast<int>(std::clamp<int64_t>(items, 1, wanted));
    readers.reserve(static_cast<size_t>(threads));
    for (int k = 0; k < threads; ++k) readers.emplace_back(p, loops);
    std::vector<double> changes(static_cast<size_t>(pairs * tiles * p.channels)), divergences(static_cast<size_t>(pairs));
    std::vector<TileSums> sums;
    sums.reserve(static_cast<size_t>(pairs * tiles));
    for (int64_t at = 0; at < pairs * tiles; ++at) sums.push_back({changes.data() + at * p.channels, 0, 0, false});
    parallel_for(items, threads, [&](int64_t item, int worker) {
        FieldReader<T>& reader = readers[static_cast<size_t>(worker)];
        if (item >= summing) {
            const int64_t pair = item - summing;
            divergences[static_cast<size_t>(pair)] = reader.divergence(pair / p.candidates, pair % p.candidates);
            return;
        }
        const int64_t first = item % groups * group, start = item / groups % strips * strip * kTile, n = item / groups / strips;
        reader.run(n, first, std::min(first + group, p.candidates), start, tiles, sums.data() + n * p.candidates * tiles);
    });

    constexpr double infinity = std::numeric_limits<double>::infinity();
    const double volume = p.volumes ? 1.0 : p.volume;
    const int64_t masked = p.mask ? std::max<int64_t>(std::count_if(p.mask, p.mask + cells, [](uint8_t m) { return m != 0; }), 1) : 1;
    const int64_t d = static_cast<int64_t>(p.distances.size()), fields = static_cast<int64_t>(p.vectors.size()) / d;
    int64_t inner = fields;
    for (int64_t k = 0; k < d; ++k)
        inner *= p.extent[3 - d + k] - (p.periodic[static_cast<size_t>(k)] ? 0 : std::min<int64_t>(2, p.extent[3 - d + k]));
    std::vector<double> residuals(static_cast<size_t>(p.channels));
    for (int64_t at = 0; at < pairs; ++at) {
        const int64_t n = at / p.candidates;
        TileSums total{residuals.data(), 0, 0, false};
        std::fill(residuals.begin(), residuals.end(), 0.0);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const TileSums& part = sums[static_cast<size_t>(at * tiles + tile)];
            for (int64_t c = 0; c < p.channels; ++c) residuals[static_cast<size_t>(c)] += part.change[c];
            total.outside += part.outside;
            total.away += part.away;
            total.bad |= part.bad;
        }
        for (int64_t c = 0; c < p.channels; ++c) {
            double& residual = residuals[static_cast<size_t>(c)];
            residual = volume * residual - (p.expected ? p.expected[n * p.channels + c] : 0.0);
        }
        const double* units = p.units ? p.units + n * (p.quantities + 1) : nullptr;
        Acc* penalties = static_cast<Acc*>(out.penalties) + at * (p.quantities + 3);
        double weighted = 0;
        for (int64_t k = 0; k < p.quantities + 3; ++k) {
            double penalty;
            if (k < p.quantities)
                penalty = combined(p.mode, p, residuals.data(), k) / (units ? units[k] : 1.0);
            else if (k == p.quantities)
                penalty = total.away / static_cast<double>(p.mask ? masked * p.channels : 1);
            else if (k == p.quantities + 1)
                penalty = total.outside / static_cast<double>(cells);
            else
                penalty =
                    divergences[static_cast<size_t>(at)] / (units ? units[p.quantities] : static_cast<double>(std::max<int64_t>(inner, 1)));
            if (total.bad || std::isnan(penalty)) penalty = infinity;
            weighted += p.weights[static_cast<size_t>(k)] * penalty;
            penalties[k] = static_cast<Acc>(penalty);
        }
        static_cast<Acc*>(out.score)[at] = static_cast<Acc>(std::isfinite(weighted) ? -weighted : -infinity);
        out.finite[at] = !total.bad;
    }
}

}  // namespace

void arm_fields_cpu(const FieldsProblem& problem, const FieldsOutput& output) {
    with_type<float, double, bfloat16>(problem.dtype, [&](auto zero) { run_typed<decltype(zero)>(problem, output); });
}

}  // namespace ttcfast
