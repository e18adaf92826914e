// The loop of accumulate_moments, compiled once per instruction set: each including file has its own compiler flags. Everything stands in
// an unnamed namespace and nothing of the standard library's templates is used, so that no function compiled for a newer processor can be
// taken by the linker for code that must run on an older one.
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "accumulate_moments.h"

namespace ttcfast {
namespace {

struct Brain {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(Brain x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// Binary16: subnormals are scaled by an exact power of two, so no rounding happens anywhere.
inline float widen(Half x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    const float magnitude = float_of(rest << 13) * float_of(0x77800000u);  // 2^112: from a bias of 127 to one of 15
    return float_of(sign | bits_of(magnitude));
}

inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, float& to) { to = x; }

// Round to nearest, ties to even; a NaN stays one.
inline void narrow(float x, Brain& to) {
    const uint32_t bits = bits_of(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to.bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline void narrow(float x, Half& to) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u, rest = bits_of(x) & 0x7fffffffu;
    uint32_t result;
    if (rest > 0x7f800000u) {
        result = 0x7e00u;
    } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
        result = 0x7c00u;
    } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the low end
        result = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
    } else {
        result = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
    }
    to.bits = static_cast<uint16_t>(sign | result);
}

// Element i of a run goes to lane i % kLanes in every instruction set, which fixes the order of the additions.
constexpr int kLanes = 16;

// How far ahead memory is asked for. On a Zen 3 core 2 KiB took a tenth off either loop (measured; 1 to 8 KiB are alike).
constexpr int64_t kAhead = 2048;

inline void fetch_ahead(const void* p) {
#if defined(__GNUC__)
    __builtin_prefetch(static_cast<const char*>(p) + kAhead);
#else
    (void)p;
#endif
}

template <class T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

#if defined(__AVX512F__)

struct Floats {
    __m512 x;
};
struct Doubles {
    __m512d low, high;
};
struct Lanes {
    __m512d low, high;
};

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const Brain* p) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(packed), 16))};
}
inline Floats load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Doubles load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline void store(float* p, const Floats& v) { _mm512_storeu_ps(p, v.x); }
inline void store(double* p, const Doubles& v) {
    _mm512_storeu_pd(p, v.low);
    _mm512_storeu_pd(p + 8, v.high);
}
inline Floats sum(const Floats& a, const Floats& b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Doubles sum(const Doubles& a, const Doubles& b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }

inline void clear(Lanes& lanes) { lanes.low = lanes.high = _mm512_setzero_pd(); }
inline void add_squares(Lanes& lanes, const Doubles& v) {
    lanes.low = _mm512_add_pd(lanes.low, _mm512_mul_pd(v.low, v.low));
    lanes.high = _mm512_add_pd(lanes.high, _mm512_mul_pd(v.high, v.high));
}
inline void add_squares(Lanes& lanes, const Floats& v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.x), 1));
    add_squares(lanes, Doubles{_mm512_cvtps_pd(_mm512_castps512_ps256(v.x)), _mm512_cvtps_pd(high)});
}
inline void spill(const Lanes& lanes, double* to) {
    _mm512_storeu_pd(to, lanes.low);
    _mm512_storeu_pd(to + 8, lanes.high);
}

#elif defined(__AVX2__)

struct Floats {
    __m256 low, high;
};
struct Doubles {
    __m256d part[4];
};
using Lanes = Doubles;

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline __m256 brain_half(const Brain* p) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
}
inline Floats load(const Brain* p) { return {brain_half(p), brain_half(p + 8)}; }
inline Floats load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline Doubles load(const double* p) {
    return {{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)}};
}
inline void store(float* p, const Floats& v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
inline void store(double* p, const Doubles& v) {
    for (int k = 0; k < 4; ++k) _mm256_storeu_pd(p + 4 * k, v.part[k]);
}
inline Floats sum(const Floats& a, const Floats& b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Doubles sum(const Doubles& a, const Doubles& b) {
    Doubles result;
    for (int k = 0; k < 4; ++k) result.part[k] = _mm256_add_pd(a.part[k], b.part[k]);
    return result;
}

inline void clear(Lanes& lanes) {
    for (auto& part : lanes.part) part = _mm256_setzero_pd();
}
inline void add_squares(Lanes& lanes, const Doubles& v) {
    for (int k = 0; k < 4; ++k) lanes.part[k] = _mm256_add_pd(lanes.part[k], _mm256_mul_pd(v.part[k], v.part[k]));
}
inline void add_squares(Lanes& lanes, const Floats& v) {
    add_squares(lanes, Doubles{{_mm256_cvtps_pd(_mm256_castps256_ps128(v.low)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.low, 1)),
                                _mm256_cvtps_pd(_mm256_castps256_ps128(v.high)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.high, 1))}});
}
inline void spill(const Lanes& lanes, double* to) {
    for (int k = 0; k < 4; ++k) _mm256_storeu_pd(to + 4 * k, lanes.part[k]);
}

#else

template <class Acc>
struct Numbers {
    Acc x[kLanes];
};
using Floats = Numbers<float>;
using Doubles = Numbers<double>;
using Lanes = Numbers<double>;

template <class T>
inline auto load(const T* p) {
    Numbers<typename Accumulator<T>::type> v;
    for (int k = 0; k < kLanes; ++k) v.x[k] = widen(p[k]);
    return v;
}
template <class Acc>
inline Numbers<Acc> sum(const Numbers<Acc>& a, const Numbers<Acc>& b) {
    Numbers<Acc> result;
    for (int k = 0; k < kLanes; ++k) result.x[k] = a.x[k] + b.x[k];
    return result;
}
inline void clear(Lanes& lanes) { lanes = {}; }
template <class Acc>
inline void add_squares(Lanes& lanes, const Numbers<Acc>& v) {
    for (int k = 0; k < kLanes; ++k) lanes.x[k] += static_cast<double>(v.x[k]) * static_cast<double>(v.x[k]);
}
inline void spill(const Lanes& lanes, double* to) { std::memcpy(to, lanes.x, sizeof lanes.x); }
inline void store(float* p, const Floats& v) { std::memcpy(p, v.x, sizeof v.x); }
inline void store(double* p, const Doubles& v) { std::memcpy(p, v.x, sizeof v.x); }

#endif

inline void copy_out(const Floats& v, float* to) { std::memcpy(to, &v, kLanes * sizeof(float)); }

// 16-bit totals are not the path to hurry: their rounding is done element by element.
template <class T>
inline void store(T* p, const Floats& v) {
    float values[kLanes];
    copy_out(v, values);
    for (int k = 0; k < kLanes; ++k) narrow(values[k], p[k]);
}

template <class G, class T, bool accumulate, bool zero>
double run(void* grad_data, void* total_data, int64_t count) {
    using Acc = typename Accumulator<T>::type;
    G* grad = static_cast<G*>(grad_data);
    T* total = static_cast<T*>(total_data);
    Lanes lanes;
    clear(lanes);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        fetch_ahead(grad + i);
        if constexpr (accumulate) fetch_ahead(total + i);
        const auto g = load(grad + i);
        add_squares(lanes, g);
        if constexpr (accumulate) store(total + i, sum(load(total + i), g));
        if constexpr (zero) std::memset(grad + i, 0, kLanes * sizeof(G));
    }
    double sums[kLanes];
    spill(lanes, sums);
    for (int lane = 0; i < count; ++i, ++lane) {
        const auto g = widen(grad[i]);
        sums[lane] += static_cast<double>(g) * static_cast<double>(g);
        if constexpr (accumulate) narrow(static_cast<Acc>(widen(total[i]) + g), total[i]);
        if constexpr (zero) std::memset(grad + i, 0, sizeof(G));
    }
    double result = 0;
    for (int lane = 0; lane < kLanes; ++lane) result += sums[lane];
    return result;
}

template <class G, class T>
constexpr MomentsVariant variant(GradDType grad, GradDType total) {
    return {grad, total, &run<G, T, true, false>, &run<G, T, true, true>, &run<G, T, false, false>, &run<G, T, false, true>};
}

constexpr MomentsVariant kVariants[kMomentsVariants] = {
    variant<float, float>(GradDType::float32, GradDType::float32),   variant<double, double>(GradDType::float64, GradDType::float64),
    variant<Brain, float>(GradDType::bfloat16, GradDType::float32),  variant<Half, float>(GradDType::float16, GradDType::float32),
    variant<Brain, Brain>(GradDType::bfloat16, GradDType::bfloat16), variant<Half, Half>(GradDType::float16, GradDType::float16),
};

}  // namespace
}  // namespace ttcfast
