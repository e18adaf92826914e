// Native vectors of numbers, for the loops that are compiled once per instruction set (level.h). Everything here has
// internal linkage. All operations are lane-wise IEEE arithmetic, so every instruction set gives the same bits.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtype.h"
#include "level.h"

#ifndef TTCFAST_LEVEL
#error "simd.h is for <op>_loop.cpp, which CMakeLists.txt compiles with TTCFAST_LEVEL"
#endif

#if defined(__GNUC__) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && !defined(TTCFAST_SCALAR)
#define TTCFAST_VECTORS
#endif

namespace ttcfast {
namespace {

#ifdef TTCFAST_VECTORS

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class Acc>
using Vector = std::conditional_t<std::is_same_v<Acc, float>, Floats, Doubles>;
// The bits of a Vector, always as 32-bit words, since no instruction set before AVX-512 has a 64-bit unsigned maximum.
template <class Acc>
using Bits = Words;

template <class Acc>
TTCFAST_INLINE Vector<Acc> splat(Acc x) {
    return x - Vector<Acc>{};
}

// The same bits in every lane.
template <class Acc>
TTCFAST_INLINE Words splat_bits(uint64_t bits) {
    if constexpr (sizeof(Acc) == 4) return static_cast<uint32_t>(bits) - Words{};
    typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
    return reinterpret_cast<Words>(bits - Longs{});
}

TTCFAST_INLINE Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}
TTCFAST_INLINE Doubles load(const double* at) {
    Doubles x;
    std::memcpy(&x, at, sizeof x);
    return x;
}
TTCFAST_INLINE Floats load(const bfloat16* at) {
#if defined(__AVX512F__)
    const Words bits =
        reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__AVX2__)
    const Words bits = reinterpret_cast<Words>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
    Halves half;
    std::memcpy(&half, at, sizeof half);
    const Words bits = __builtin_convertvector(half, Words);
#endif
    return reinterpret_cast<Floats>(bits << 16);
}
TTCFAST_INLINE Floats load(const float16* at) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
#else
    Floats x;
    for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = widen(at[i]);
    return x;
#endif
}

// Lanes 0, 1, ... (half 0) or the upper lanes (half 1) of x in double.
template <int half>
TTCFAST_INLINE Doubles widened(Floats x) {
#if defined(__AVX512F__)
    const __m512d bits = reinterpret_cast<__m512d>(x);
    return _mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(_mm512_maskz_extractf64x4_pd(0xf, bits, half)));
#elif defined(__AVX2__)
    return _mm256_cvtps_pd(_mm256_extractf128_ps(x, half));
#else
    Doubles wide;
    for (int i = 0; i < kVectorBytes / 8; ++i) wide[i] = x[half * (kVectorBytes / 8) + i];
    return wide;
#endif
}

template <class V>
TTCFAST_INLINE Words bits_of(V x) {
    return reinterpret_cast<Words>(x);
}
template <class Acc>
TTCFAST_INLINE Vector<Acc> from_bits(Words x) {
    return reinterpret_cast<Vector<Acc>>(x);
}

#if defined(__AVX512F__)
TTCFAST_INLINE Floats square_root(Floats x) { return _mm512_maskz_sqrt_ps(0xffff, x); }
TTCFAST_INLINE Doubles square_root(Doubles x) { return _mm512_maskz_sqrt_pd(0xff, x); }
#elif defined(__AVX2__)
TTCFAST_INLINE Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
TTCFAST_INLINE Doubles square_root(Doubles x) { return _mm256_sqrt_pd(x); }
#else
template <class V>
TTCFAST_INLINE V square_root(V x) {
    for (size_t i = 0; i < sizeof x / sizeof x[0]; ++i) x[i] = sizeof x[i] == 4 ? sqrtf(x[i]) : sqrt(x[i]);
    return x;
}
#endif

TTCFAST_INLINE Words maximum(Words a, Words b) { return a > b ? a : b; }

// For double, `limit` ends in 32 ones: the upper words alone decide, since the lower ones never exceed it.
template <class Acc>
TTCFAST_INLINE Words exceeds(Words x, uint64_t limit) {
    return reinterpret_cast<Words>(x > splat_bits<Acc>(limit));
}

TTCFAST_INLINE bool any(Words x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x)) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(x));
#else
    uint64_t part[kVectorBytes / 8], all = 0;
    std::memcpy(part, &x, sizeof part);
    for (uint64_t p : part) all |= p;
    return all != 0;
#endif
}

#else  // One number per "vector"; loops over a group's lanes are left to the compiler.

template <class Acc>
using Vector = Acc;
template <class Acc>
using Bits = std::conditional_t<sizeof(Acc) == 4, uint32_t, uint64_t>;

template <class Acc>
TTCFAST_INLINE Acc splat(Acc x) {
    return x;
}
template <class Acc>
TTCFAST_INLINE Bits<Acc> splat_bits(uint64_t bits) {
    return static_cast<Bits<Acc>>(bits);
}

template <class V>
TTCFAST_INLINE Bits<V> bits_of(V x) {
    Bits<V> bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
template <class Acc>
TTCFAST_INLINE Acc from_bits(Bits<Acc> bits) {
    Acc x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

TTCFAST_INLINE float load(const float* at) { return *at; }
TTCFAST_INLINE double load(const double* at) { return *at; }
TTCFAST_INLINE float load(const bfloat16* at) { return widen(*at); }
TTCFAST_INLINE float load(const float16* at) { return widen(*at); }
template <int>
TTCFAST_INLINE double widened(float x) {
    return x;
}

TTCFAST_INLINE float square_root(float x) { return sqrtf(x); }
TTCFAST_INLINE double square_root(double x) { return sqrt(x); }

template <class B>
TTCFAST_INLINE B maximum(B a, B b) {
    return a > b ? a : b;
}
template <class Acc>
TTCFAST_INLINE Bits<Acc> exceeds(Bits<Acc> x, uint64_t limit) {
    return x > limit ? ~Bits<Acc>(0) : Bits<Acc>(0);
}
template <class B>
TTCFAST_INLINE bool any(B x) {
    return x != 0;
}
#endif

template <class Acc>
constexpr int kWidth = sizeof(Vector<Acc>) / sizeof(Acc);  // lanes of a vector

template <class Acc>
TTCFAST_INLINE void store(Acc* at, Vector<Acc> x) {
    std::memcpy(at, &x, sizeof x);
}

template <class Acc>
TTCFAST_INLINE Bits<Acc> magnitude(Vector<Acc> x) {
    return bits_of(x) & splat_bits<Acc>(sizeof(Acc) == 4 ? 0x7fffffffu : 0x7fffffffffffffffull);
}

// max(0, x) and max(0, -x), propagating NaN.
template <class Acc>
TTCFAST_INLINE Vector<Acc> above_zero(Vector<Acc> x) {
    const Vector<Acc> zero{};
    return zero > x ? zero : x;  // one instruction
}
template <class Acc>
TTCFAST_INLINE Vector<Acc> below_zero(Vector<Acc> x) {
    return above_zero<Acc>(-x);
}

// Prefetches the memory `ahead` bytes further on into the first or second cache.
template <int ahead, int cache = 1, class T>
TTCFAST_INLINE void fetch(const T* at) {
#ifdef __GNUC__
    __builtin_prefetch(reinterpret_cast<const char*>(at) + ahead, 0, 4 - cache);
#else
    (void)at;
#endif
}

template <class Work, int... I>
TTCFAST_INLINE void unroll(const Work& work, std::integer_sequence<int, I...>) {
    (work(std::integral_constant<int, I>{}), ...);
}
// Calls work(0), ..., work(n - 1), each with a constant index, so that arrays of vectors stay in registers.
template <int n, class Work>
TTCFAST_INLINE void unroll(const Work& work) {
    unroll(work, std::make_integer_sequence<int, n>{});
}

}  // namespace
}  // namespace ttcfast
