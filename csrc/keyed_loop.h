// Runs of one row, compiled once per level and called by keyed_cpu.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// Parameters common to all elements of a row.
struct RowKey {
    uint32_t key[2];        // Philox's key
    uint32_t candidate[2];  // low and high half
    uint32_t problem;
    uint32_t flip;  // all ones in a row that negates another one, otherwise 0
};

// `first` is a multiple of 4; x and out start at that element. T: float, double, bfloat16.
template <Level level>
void keyed_words(const RowKey& row, int64_t first, int64_t n, uint32_t* out);
template <class T, Level level>
void normal_tile(const RowKey& row, int64_t first, int64_t n, T* out);
template <class T, Level level>
void add_noise_tile(const RowKey& row, int64_t first, int64_t n, const T* x, double sigma, T* out);
template <class T, Level level>
void dropout_tile(const RowKey& row, int64_t first, int64_t n, const T* x, uint32_t threshold, double scale, T* out);

}  // namespace ttcfast
