// Stretches of one row, compiled once per level: what keyed_cpu.cpp calls.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// What is the same for all elements of a row.
struct RowKey {
    uint32_t key[2];        // Philox's key
    uint32_t candidate[2];  // low and high half
    uint32_t problem;
    uint32_t flip;  // all ones in a row that is the opposite of another one, else 0
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
