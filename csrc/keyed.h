// Random numbers that are a function of (seed, step, site, problem, candidate, element): normals, noise on states, dropout.
// Plain structs and functions; the definitions are in ttcfast/ops/keyed.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

// Row m of a result belongs to (problem, candidate) = rows[m].
struct KeyedRows {
    const int64_t* rows;  // [count, 2]
    int64_t count;
    int64_t elements;       // of a row
    const int64_t* stream;  // [1], the 64 bits of (seed, step)
    int64_t site;
    bool antithetic;
    int threads;
    Level level;
};

// A tensor [row, s0, s1, s2]; strides in elements.
struct KeyedInput {
    const void* data;
    int64_t row_stride;
    int64_t extent[3], stride[3];
};

// All throw std::invalid_argument if a row holds a negative number or a problem of 2**32 or more.
// Results depend neither on `threads` or `level` nor on the other rows of the call. Output rows are contiguous.
void normal_cpu(const KeyedRows& rows, DType dtype, void* out);

// Row m of the result is row m / copies of x, plus sigma times normals.
void add_noise_cpu(const KeyedRows& rows, DType dtype, const KeyedInput& x, int64_t copies, double sigma, void* out);

// Keeps an entry, times `scale`, if its draw is at least `threshold`; 2**32 keeps none.
void keyed_dropout_cpu(const KeyedRows& rows, DType dtype, const KeyedInput& x, uint64_t threshold, double scale, void* out);

// The integers themselves, for elements [first, first + n) of one row; `key` is Philox's own.
void keyed_words_cpu(uint64_t key, uint32_t problem, uint64_t candidate, int64_t first, int64_t n, Level level, uint32_t* out);

}  // namespace ttcfast
