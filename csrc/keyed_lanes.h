// The lanes of keyed_loop.cpp: kCounters counters, one per 64-bit lane, ordered so that `store_joined` and `store_interleaved` write
// results back in element order.
#pragma once

#include "simd.h"

namespace ttcfast {
namespace {

#if defined(TTCFAST_VECTORS) && defined(__AVX2__)

struct Lanes {
    using Wide = Words;  // each pair of words is a 64-bit lane
    using Int = Words;
    using Float = Floats;
    static constexpr int kCounters = kVectorBytes / 8;

    typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
#ifdef __AVX512F__
    using Native = __m512i;
#else
    using Native = __m256i;
#endif
    static Native raw(Int a) { return reinterpret_cast<Native>(a); }
    static Int words(Native a) { return reinterpret_cast<Int>(a); }

    static Int all(uint32_t x) { return x - Int{}; }
    static Float all(float x) { return splat(x); }
    static Wide wide(uint32_t x) { return all(x); }
    static Wide high(Wide a) { return reinterpret_cast<Wide>(reinterpret_cast<Longs>(a) >> 32); }
    static Int sum(Int a, Int b) { return a + b; }
    static Int least(Int a, Int b) { return a < b ? a : b; }
    static Int left1(Int a) { return a << 1; }
    static Int left2(Int a) { return a << 2; }
    static Int exponent(Int bits) { return bits >> 23; }
    static Int bits(Float a) { return bits_of(a); }
    static Float number(Int a) { return from_bits<float>(a); }
    static Float to_float(Int a) { return __builtin_convertvector(reinterpret_cast<Signed>(a), Float); }
    static Float add(Float a, Float b) { return a + b; }
    static Float times(Float a, Float b) { return a * b; }
    static Float root(Float a) { return square_root(a); }

#ifdef __AVX512F__
    static Wide counters(uint32_t group) { return all(group) + words(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)); }
    static Wide multiply(Wide a, Wide b) { return words(_mm512_maskz_mul_epu32(0xff, raw(a), raw(b))); }
    static Int pair(Wide low, Wide high) {
        const Longs moved = reinterpret_cast<Longs>(high) << 32;
        return words(_mm512_mask_blend_epi32(0xaaaa, raw(low), reinterpret_cast<Native>(moved)));
    }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float choose(Int negative, Float yes, Float no) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(raw(negative)), no, yes); }
    static void store_joined(Int a, Int b, uint32_t* out) {
        _mm512_storeu_si512(out, _mm512_maskz_unpacklo_epi64(0xff, raw(a), raw(b)));
        _mm512_storeu_si512(out + 16, _mm512_maskz_unpackhi_epi64(0xff, raw(a), raw(b)));
    }
    static void store_interleaved(Float even, Float odd, float* out) {
        _mm512_storeu_ps(out, _mm512_maskz_unpacklo_ps(0xffff, even, odd));
        _mm512_storeu_ps(out + 16, _mm512_maskz_unpackhi_ps(0xffff, even, odd));
    }
#else
    static Wide counters(uint32_t group) { return all(group) + words(_mm256_set_epi64x(3, 1, 2, 0)); }
    static Wide multiply(Wide a, Wide b) { return words(_mm256_mul_epu32(raw(a), raw(b))); }
    static Int pair(Wide low, Wide high) {
        const Longs moved = reinterpret_cast<Longs>(high) << 32;
        return words(_mm256_blend_epi32(raw(low), reinterpret_cast<Native>(moved), 0xaa));
    }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float choose(Int negative, Float yes, Float no) { return _mm256_blendv_ps(no, yes, number(negative)); }
    static void store_joined(Int a, Int b, uint32_t* out) {
        _mm256_storeu_si256(reinterpret_cast<Native*>(out), _mm256_unpacklo_epi64(raw(a), raw(b)));
        _mm256_storeu_si256(reinterpret_cast<Native*>(out + 8), _mm256_unpackhi_epi64(raw(a), raw(b)));
    }
    static void store_interleaved(Float even, Float odd, float* out) {
        _mm256_storeu_ps(out, _mm256_unpacklo_ps(even, odd));
        _mm256_storeu_ps(out + 8, _mm256_unpackhi_ps(even, odd));
    }
#endif
};

#else  // Any processor, including ARM64: arrays and plain loops, which the compiler may vectorise.

constexpr int kLanes = 8;

struct Wides {
    uint64_t lane[kLanes / 2];
};
struct Integers {
    uint32_t lane[kLanes];
};
struct Singles {
    float lane[kLanes];
};

template <class Lane, class Of>
inline Lane each(const Of& of) {
    Lane result;
    for (size_t i = 0; i < sizeof result.lane / sizeof result.lane[0]; ++i) result.lane[i] = of(i);
    return result;
}

inline Wides operator^(const Wides& a, const Wides& b) {
    return each<Wides>([&](size_t i) { return a.lane[i] ^ b.lane[i]; });
}
inline Integers operator^(const Integers& a, const Integers& b) {
    return each<Integers>([&](size_t i) { return a.lane[i] ^ b.lane[i]; });
}
inline Integers operator&(const Integers& a, const Integers& b) {
    return each<Integers>([&](size_t i) { return a.lane[i] & b.lane[i]; });
}
inline Integers operator|(const Integers& a, const Integers& b) {
    return each<Integers>([&](size_t i) { return a.lane[i] | b.lane[i]; });
}
inline Integers operator~(const Integers& a) {
    return each<Integers>([&](size_t i) { return ~a.lane[i]; });
}

struct Lanes {
    using Wide = Wides;
    using Int = Integers;
    using Float = Singles;
    static constexpr int kCounters = kLanes / 2;

    static Wide wide(uint32_t x) {
        return each<Wide>([&](size_t) { return x; });
    }
    static Int all(uint32_t x) {
        return each<Int>([&](size_t) { return x; });
    }
    static Float all(float x) {
        return each<Float>([&](size_t) { return x; });
    }
    static Wide counters(uint32_t group) {
        return each<Wide>([&](size_t i) { return group + static_cast<uint32_t>(i); });
    }
    static Wide multiply(const Wide& a, const Wide& b) {
        return each<Wide>([&](size_t i) { return (a.lane[i] & 0xffffffffu) * (b.lane[i] & 0xffffffffu); });
    }
    static Wide high(const Wide& a) {
        return each<Wide>([&](size_t i) { return a.lane[i] >> 32; });
    }
    static Int pair(const Wide& low, const Wide& high) {
        Int result;
        for (int i = 0; i < kCounters; ++i) {
            result.lane[2 * i] = static_cast<uint32_t>(low.lane[i]);
            result.lane[2 * i + 1] = static_cast<uint32_t>(high.lane[i]);
        }
        return result;
    }

    static Int sum(const Int& a, const Int& b) {
        return each<Int>([&](size_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Int least(const Int& a, const Int& b) {
        return each<Int>([&](size_t i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    static Int left1(const Int& a) {
        return each<Int>([&](size_t i) { return a.lane[i] << 1; });
    }
    static Int left2(const Int& a) {
        return each<Int>([&](size_t i) { return a.lane[i] << 2; });
    }
    static Int exponent(const Int& bits) {
        return each<Int>([&](size_t i) { return bits.lane[i] >> 23; });
    }
    static Int bits(const Float& a) {
        Int result;
        std::memcpy(&result, &a, sizeof result);
        return result;
    }
    static Float number(const Int& a) {
        Float result;
        std::memcpy(&result, &a, sizeof result);
        return result;
    }
    static Float to_float(const Int& a) {
        return each<Float>([&](size_t i) { return static_cast<float>(static_cast<int32_t>(a.lane[i])); });
    }
    static Float add(const Float& a, const Float& b) {
        return each<Float>([&](size_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Float times(const Float& a, const Float& b) {
        return each<Float>([&](size_t i) { return a.lane[i] * b.lane[i]; });
    }
    static Float fma(const Float& a, const Float& b, const Float& c) {
        return each<Float>([&](size_t i) { return fmaf(a.lane[i], b.lane[i], c.lane[i]); });
    }
    static Float root(const Float& a) {
        return each<Float>([&](size_t i) { return sqrtf(a.lane[i]); });
    }
    static Float choose(const Int& negative, const Float& yes, const Float& no) {
        return each<Float>([&](size_t i) { return negative.lane[i] >> 31 ? yes.lane[i] : no.lane[i]; });
    }

    static void store_joined(const Int& a, const Int& b, uint32_t* out) {
        for (int i = 0; i < 8; ++i) out[i / 2 * 4 + i % 2] = a.lane[i];
        for (int i = 0; i < 8; ++i) out[i / 2 * 4 + 2 + i % 2] = b.lane[i];
    }
    static void store_interleaved(const Float& even, const Float& odd, float* out) {
        for (int i = 0; i < 8; ++i) out[2 * i] = even.lane[i];
        for (int i = 0; i < 8; ++i) out[2 * i + 1] = odd.lane[i];
    }
};

#endif

}  // namespace
}  // namespace ttcfast
