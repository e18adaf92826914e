// Element types: their codes, the two 16-bit formats, conversions, and the choice of a template by a code.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __GNUC__
#define TTCFAST_INLINE inline __attribute__((always_inline))
#else
#define TTCFAST_INLINE inline
#endif

namespace ttcfast {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };  // in the order of DTYPES in ttcfast/ops/native.py

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::float32
                         : std::is_same_v<T, double>   ? DType::float64
                         : std::is_same_v<T, bfloat16> ? DType::bfloat16
                                                       : DType::float16;

// The type for computations with numbers of type T.
template <class T>
using AccumulatorOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls call(T()) for the T among Types that has this code.
template <class... Types, class Call>
void with_type(DType dtype, const Call& call) {
    ((kDType<Types> == dtype ? static_cast<void>(call(Types())) : void()), ...);
}

constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2; }

namespace {  // compiled once per instruction set (level.h)

TTCFAST_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
TTCFAST_INLINE uint32_t word_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

TTCFAST_INLINE double widen(double x) { return x; }
TTCFAST_INLINE float widen(float x) { return x; }
TTCFAST_INLINE float widen(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// Subnormal numbers are scaled by an exact power of two, so nothing is rounded.
TTCFAST_INLINE float widen(float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float magnitude = float_of(rest << 13) * float_of(0x77800000u);  // 2^112: from a bias of 127 to one of 15
    return float_of(sign | word_of(magnitude));
}

// Rounds to nearest, ties to even; NaN stays NaN.
TTCFAST_INLINE void narrow(double x, double& to) { to = x; }
TTCFAST_INLINE void narrow(float x, float& to) { to = x; }
TTCFAST_INLINE void narrow(float x, bfloat16& to) {
    const uint32_t bits = word_of(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
TTCFAST_INLINE void narrow(float x, float16& to) {
    const uint32_t sign = word_of(x) >> 16 & 0x8000u, rest = word_of(x) & 0x7fffffffu;
    uint32_t result;
    if (rest > 0x7f800000u) {
        result = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
        result = 0x7c00u;
    } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the low end
        result = word_of(float_of(rest) + 0.5f) - word_of(0.5f);
    } else {
        result = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | result);
}

}  // namespace
}  // namespace ttcfast
