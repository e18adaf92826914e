#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "field.h"
#include "keyed.h"
#include "keyed_tile.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kTile = 8192;            // elements per work item
constexpr int64_t kGathered = 1024;        // elements of a strided row copied at a time
constexpr int64_t kSerialBelow = 1 << 16;  // elements under which starting a thread costs more than it saves

std::vector<const KeyedTiles*> usable() {
    std::vector<const KeyedTiles*> found;
    for (const KeyedTiles* tiles : {keyed_tiles_avx512(), keyed_tiles_avx2(), keyed_tiles_generic()})
        if (tiles) found.push_back(tiles);
    return found;
}

const KeyedTiles& tiles_of(const char* instructions) {
    static const std::vector<const KeyedTiles*> found = usable();
    for (const KeyedTiles* tiles : found)
        if (!*instructions || !std::strcmp(instructions, tiles->name)) return *tiles;
    throw std::invalid_argument(std::string("this processor has no instructions called ") + instructions);
}

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

// Calls work(key of the row, row, first element, number of elements) for stretches that cover every row.
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

// Elements [start, start + n) of the row-major grid at `base`, copied into `buffer`.
template <class T>
void gather(const T* base, const KeyedInput& x, int64_t start, int64_t n, T* buffer) {
    for (int64_t done = 0; done < n;) {
        const int64_t element = start + done, column = element % x.extent[2];
        const int64_t line = element / x.extent[2] % x.extent[1], plane = element / x.extent[2] / x.extent[1];
        const int64_t run = std::min(n - done, x.extent[2] - column);
        const T* from = base + plane * x.stride[0] + line * x.stride[1] + column * x.stride[2];
        for (int64_t i = 0; i < run; ++i) buffer[done + i] = from[i * x.stride[2]];
        done += run;
    }
}

// Calls use(input, first element, number of elements, where in the tile) with contiguous input: in place, or copied piece by piece.
template <class T, class Use>
void with_input(const KeyedInput& x, int64_t row, int64_t first, int64_t n, const Use& use) {
    const T* base = static_cast<const T*>(x.data) + row * x.row_stride;
    if (Grid{{x.extent[0], x.extent[1], x.extent[2]}}.contiguous(x.stride)) return use(base + first, first, n, int64_t{0});
    T buffer[kGathered];
    for (int64_t done = 0; done < n; done += kGathered) {
        const int64_t length = std::min(kGathered, n - done);
        gather(base, x, first + done, length, buffer);
        use(buffer, first + done, length, done);
    }
}

template <class T>
void add_noise(const KeyedRows& rows, const KeyedInput& x, int64_t copies, double sigma, T* out, KeyedTiles::AddNoise* tile) {
    for_tiles(rows, [&](const RowKey& key, int64_t row, int64_t start, int64_t n) {
        T* to = out + row * rows.elements + start;
        with_input<T>(x, row / copies, start, n,
                      [&](const T* from, int64_t first, int64_t length, int64_t at) { tile(key, first, length, from, sigma, to + at); });
    });
}

template <class T>
void dropout(const KeyedRows& rows, const KeyedInput& x, uint32_t threshold, double scale, T* out, KeyedTiles::Dropout* tile) {
    for_tiles(rows, [&](const RowKey& key, int64_t row, int64_t start, int64_t n) {
        T* to = out + row * rows.elements + start;
        with_input<T>(x, row, start, n, [&](const T* from, int64_t first, int64_t length, int64_t at) {
            tile(key, first, length, from, threshold, scale, to + at);
        });
    });
}

size_t bytes(KeyedType type) { return type == KeyedType::float64 ? 8 : type == KeyedType::float32 ? 4 : 2; }

}  // namespace

std::vector<std::string> keyed_instructions() {
    std::vector<std::string> names;
    for (const KeyedTiles* tiles : usable()) names.emplace_back(tiles->name);
    return names;
}

void keyed_words_cpu(uint64_t key, uint32_t problem, uint64_t candidate, int64_t first, int64_t n, const char* instructions,
                     uint32_t* out) {
    tiles_of(instructions).words(row_key(key, problem, candidate, false), first, n, out);
}

void normal_cpu(const KeyedRows& rows, KeyedType type, void* out) {
    const auto tile = tiles_of(rows.instructions).normal[static_cast<int>(type)];
    for_tiles(rows, [&](const RowKey& key, int64_t row, int64_t start, int64_t n) {
        tile(key, start, n, static_cast<char*>(out) + (row * rows.elements + start) * bytes(type));
    });
}

void add_noise_cpu(const KeyedRows& rows, KeyedType type, const KeyedInput& x, int64_t copies, double sigma, void* out) {
    const auto tile = tiles_of(rows.instructions).add_noise[static_cast<int>(type)];
    switch (type) {
        case KeyedType::float32:
            return add_noise(rows, x, copies, sigma, static_cast<float*>(out), tile);
        case KeyedType::float64:
            return add_noise(rows, x, copies, sigma, static_cast<double*>(out), tile);
        case KeyedType::bfloat16:
            return add_noise(rows, x, copies, sigma, static_cast<bfloat16*>(out), tile);
    }
}

void keyed_dropout_cpu(const KeyedRows& rows, KeyedType type, const KeyedInput& x, uint64_t threshold, double scale, void* out) {
    if (threshold > 0xffffffffu) {
        check_values(rows);
        if (rows.count * rows.elements) std::memset(out, 0, rows.count * rows.elements * bytes(type));  // of nothing there is no address
        return;
    }
    const auto tile = tiles_of(rows.instructions).dropout[static_cast<int>(type)];
    const auto least = static_cast<uint32_t>(threshold);
    switch (type) {
        case KeyedType::float32:
            return dropout(rows, x, least, scale, static_cast<float*>(out), tile);
        case KeyedType::float64:
            return dropout(rows, x, least, scale, static_cast<double*>(out), tile);
        case KeyedType::bfloat16:
            return dropout(rows, x, least, scale, static_cast<bfloat16*>(out), tile);
    }
}

}  // namespace ttcfast
