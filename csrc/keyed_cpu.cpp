#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "field.h"
#include "keyed.h"
#include "keyed_loop.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kTile = 8192;            // elements per work item
constexpr int64_t kGathered = 1024;        // elements of a strided row copied at a time
constexpr int64_t kSerialBelow = 1 << 16;  // elements below which waking a thread costs more than it saves

// Output number site + 1 of SplitMix64 started at the stream: Philox's key.
uint64_t key_of(const KeyedRows& rows) {
    uint64_t z = static_cast<uint64_t>(*rows.stream) + 0x9E3779B97F4A7C15ull * (static_cast<uint64_t>(rows.site) + 1);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

RowKey row_key(uint64_t key, uint32_t problem, uint64_t candidate, bool antithetic) {
    const bool opposite = antithetic && candidate >= 2 && candidate % 2 == 0;
    const uint64_t drawn = candidate - opposite;
    return {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
            {static_cast<uint32_t>(drawn), static_cast<uint32_t>(drawn >> 32)},
            problem,
            opposite ? 0xffffffffu : 0u};
}

void check_values(const KeyedRows& rows) {
    for (int64_t i = 0; i < 2 * rows.count; ++i)
        if (rows.rows[i] < 0)
            throw std::invalid_argument("rows hold " + std::to_string(rows.rows[i]) + "; problems and candidates are 0 or more");
    for (int64_t row = 0; row < rows.count; ++row)
        if (rows.rows[2 * row] >> 32)
            throw std::invalid_argument("rows hold the problem " + std::to_string(rows.rows[2 * row]) + "; problems are below 2**32");
}

// Calls work(key of the row, row, first element, number of elements) for runs that cover every row.
template <class Work>
void for_tiles(const KeyedRows& rows, const Work& work) {
    check_values(rows);
    const uint64_t key = key_of(rows);
    const int64_t tiles = (rows.elements + kTile - 1) / kTile;
    const int threads = rows.count * rows.elements < kSerialBelow ? 1 : rows.threads;
    parallel_for(rows.count * tiles, threads, [&](int64_t item, int) {
        const int64_t row = item / tiles, first = item % tiles * kTile;
        const auto problem = static_cast<uint32_t>(rows.rows[2 * row]);
        const auto candidate = static_cast<uint64_t>(rows.rows[2 * row + 1]);
        work(row_key(key, problem, candidate, rows.antithetic), row, first, std::min(kTile, rows.elements - first));
    });
}

// Calls use(input, first element, number of elements, position in the tile) with contiguous input: in place, or copied piece by piece.
template <class T, class Use>
void with_input(const KeyedInput& x, int64_t row, int64_t first, int64_t n, const Use& use) {
    const T* base = static_cast<const T*>(x.data) + row * x.row_stride;
    const Grid grid{{x.extent[0], x.extent[1], x.extent[2]}};
    if (grid.contiguous(x.stride)) return use(base + first, first, n, int64_t{0});
    T buffer[kGathered];
    for (int64_t done = 0; done < n; done += kGathered) {
        const int64_t length = std::min(kGathered, n - done);
        use(read_cells(base, grid, x.stride, false, first + done, length, buffer), first + done, length, done);
    }
}

}  // namespace

void keyed_words_cpu(uint64_t key, uint32_t problem, uint64_t candidate, int64_t first, int64_t n, Level level, uint32_t* out) {
    at_level(level, [](auto level) { return &keyed_words<level>; })(row_key(key, problem, candidate, false), first, n, out);
}

void normal_cpu(const KeyedRows& rows, DType dtype, void* out) {
    with_type<float, double, bfloat16>(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto tile = at_level(rows.level, [](auto level) { return &normal_tile<T, level>; });
        for_tiles(rows, [&](const RowKey& key, int64_t row, int64_t start, int64_t n) {
            tile(key, start, n, static_cast<T*>(out) + row * rows.elements + start);
        });
    });
}

void add_noise_cpu(const KeyedRows& rows, DType dtype, const KeyedInput& x, int64_t copies, double sigma, void* out) {
    with_type<float, double, bfloat16>(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto tile = at_level(rows.level, [](auto level) { return &add_noise_tile<T, level>; });
        for_tiles(rows, [&](const RowKey& key, int64_t row, int64_t start, int64_t n) {
            T* to = static_cast<T*>(out) + row * rows.elements + start;
            with_input<T>(x, row / copies, start, n, [&](const T* from, int64_t first, int64_t length, int64_t at) {
                tile(key, first, length, from, sigma, to + at);
            });
        });
    });
}

void keyed_dropout_cpu(const KeyedRows& rows, DType dtype, const KeyedInput& x, uint64_t threshold, double scale, void* out) {
    if (threshold > 0xffffffffu) {
        check_values(rows);
        if (rows.count * rows.elements) std::memset(out, 0, rows.count * rows.elements * size_of(dtype));  // an empty tensor has no address
        return;
    }
    with_type<float, double, bfloat16>(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto tile = at_level(rows.level, [](auto level) { return &dropout_tile<T, level>; });
        for_tiles(rows, [&](const RowKey& key, int64_t row, int64_t start, int64_t n) {
            T* to = static_cast<T*>(out) + row * rows.elements + start;
            with_input<T>(x, row, start, n, [&](const T* from, int64_t first, int64_t length, int64_t at) {
                tile(key, first, length, from, static_cast<uint32_t>(threshold), scale, to + at);
            });
        });
    });
}

}  // namespace ttcfast
