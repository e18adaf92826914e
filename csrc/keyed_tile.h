// One stretch of one row, compiled once per instruction set: what keyed_cpu.cpp chooses from at run time.
#pragma once

#include <cstdint>

#include "field.h"

namespace ttcfast {

// What is the same for all elements of a row.
struct RowKey {
    uint32_t key[2];        // Philox's key
    uint32_t candidate[2];  // low and high half
    uint32_t problem;
    uint32_t flip;  // all ones in a row that is the opposite of another one, else 0
};

// `first` is a multiple of 4; x and out start at that element. Elements of one type: float, double, bfloat16.
struct KeyedTiles {
    using Words = void(const RowKey& row, int64_t first, int64_t n, uint32_t* out);
    using Normal = void(const RowKey& row, int64_t first, int64_t n, void* out);
    using AddNoise = void(const RowKey& row, int64_t first, int64_t n, const void* x, double sigma, void* out);
    using Dropout = void(const RowKey& row, int64_t first, int64_t n, const void* x, uint32_t threshold, double scale, void* out);

    const char* name;
    Words* words;
    Normal* normal[3];
    AddNoise* add_noise[3];
    Dropout* dropout[3];
};

// Null where the compiler or the processor has no such instructions.
const KeyedTiles* keyed_tiles_generic();
const KeyedTiles* keyed_tiles_avx2();
const KeyedTiles* keyed_tiles_avx512();

}  // namespace ttcfast

// Everything between the two macros may use the instruction set; standard headers stay outside, whose inline functions are shared.
#if defined(__x86_64__) && defined(__clang__)
#define TTCFAST_X86 1
#define TTCFAST_PRAGMA(text) _Pragma(#text)
#define TTCFAST_TARGET_BEGIN(set) TTCFAST_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define TTCFAST_TARGET_END _Pragma("clang attribute pop")
#elif defined(__x86_64__) && defined(__GNUC__)
#define TTCFAST_X86 1
#define TTCFAST_PRAGMA(text) _Pragma(#text)
#define TTCFAST_TARGET_BEGIN(set) _Pragma("GCC push_options") TTCFAST_PRAGMA(GCC target(set))
#define TTCFAST_TARGET_END _Pragma("GCC pop_options")
#else
#define TTCFAST_X86 0
#endif
