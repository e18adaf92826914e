#include "keyed_tile.h"

#if TTCFAST_X86
#include <immintrin.h>

#include "keyed_coefficients.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 warns about its own header: its bug 105593
#endif
TTCFAST_TARGET_BEGIN("avx2,fma,avx512f,avx512dq")
namespace ttcfast {
namespace {

struct Lanes {
    using Wide = __m512i;  // 64-bit lanes
    using Int = __m512i;   // 32-bit lanes
    using Float = __m512;
    static constexpr const char* kName = "avx512";
    static constexpr int kCounters = 8;

    static Int all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static Float all(float x) { return _mm512_set1_ps(x); }
    static Wide wide(uint32_t x) { return all(x); }
    static Wide counters(uint32_t group) { return _mm512_add_epi32(all(group), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0)); }
    static Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
    static Wide high(Wide a) { return _mm512_srli_epi64(a, 32); }
    static Int pair(Wide low, Wide high) { return _mm512_mask_blend_epi32(0xaaaa, low, _mm512_slli_epi64(high, 32)); }

    static Int sum(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Int least(Int a, Int b) { return _mm512_min_epu32(a, b); }
    static Int left1(Int a) { return _mm512_slli_epi32(a, 1); }
    static Int left2(Int a) { return _mm512_slli_epi32(a, 2); }
    static Int exponent(Int bits) { return _mm512_srli_epi32(bits, 23); }
    static Int bits(Float a) { return _mm512_castps_si512(a); }
    static Float number(Int a) { return _mm512_castsi512_ps(a); }
    static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float times(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float root(Float a) { return _mm512_sqrt_ps(a); }
    static Float choose(Int negative, Float yes, Float no) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(negative), no, yes); }

    static void store_joined(Int a, Int b, uint32_t* out) {
        _mm512_storeu_si512(out, _mm512_unpacklo_epi64(a, b));
        _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(a, b));
    }
    static void store_interleaved(Float even, Float odd, float* out) {
        _mm512_storeu_ps(out, _mm512_unpacklo_ps(even, odd));
        _mm512_storeu_ps(out + 16, _mm512_unpackhi_ps(even, odd));
    }
};

#include "keyed_body.h"

}  // namespace
}  // namespace ttcfast
TTCFAST_TARGET_END

namespace ttcfast {
const KeyedTiles* keyed_tiles_avx512() {
    const bool all = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f") &&
                     __builtin_cpu_supports("avx512dq");
    return all ? &kTiles : nullptr;
}
}  // namespace ttcfast

#else
namespace ttcfast {
const KeyedTiles* keyed_tiles_avx512() { return nullptr; }
}  // namespace ttcfast
#endif
