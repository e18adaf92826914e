#include "keyed_tile.h"

#if TTCFAST_X86
#include <immintrin.h>

#include "keyed_coefficients.h"

TTCFAST_TARGET_BEGIN("avx2,fma")
namespace ttcfast {
namespace {

struct Lanes {
    using Wide = __m256i;  // 64-bit lanes
    using Int = __m256i;   // 32-bit lanes
    using Float = __m256;
    static constexpr const char* kName = "avx2";
    static constexpr int kCounters = 4;

    static Int all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static Float all(float x) { return _mm256_set1_ps(x); }
    static Wide wide(uint32_t x) { return all(x); }
    static Wide counters(uint32_t group) { return _mm256_add_epi32(all(group), _mm256_set_epi64x(3, 1, 2, 0)); }
    static Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
    static Wide high(Wide a) { return _mm256_srli_epi64(a, 32); }
    static Int pair(Wide low, Wide high) { return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa); }

    static Int sum(Int a, Int b) { return _mm256_add_epi32(a, b); }
    static Int least(Int a, Int b) { return _mm256_min_epu32(a, b); }
    static Int left1(Int a) { return _mm256_slli_epi32(a, 1); }
    static Int left2(Int a) { return _mm256_slli_epi32(a, 2); }
    static Int exponent(Int bits) { return _mm256_srli_epi32(bits, 23); }
    static Int bits(Float a) { return _mm256_castps_si256(a); }
    static Float number(Int a) { return _mm256_castsi256_ps(a); }
    static Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float times(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float root(Float a) { return _mm256_sqrt_ps(a); }
    static Float choose(Int negative, Float yes, Float no) { return _mm256_blendv_ps(no, yes, number(negative)); }

    static void store_joined(Int a, Int b, uint32_t* out) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi64(a, b));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_unpackhi_epi64(a, b));
    }
    static void store_interleaved(Float even, Float odd, float* out) {
        _mm256_storeu_ps(out, _mm256_unpacklo_ps(even, odd));
        _mm256_storeu_ps(out + 8, _mm256_unpackhi_ps(even, odd));
    }
};

#include "keyed_body.h"

}  // namespace
}  // namespace ttcfast
TTCFAST_TARGET_END

namespace ttcfast {
const KeyedTiles* keyed_tiles_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kTiles : nullptr; }
}  // namespace ttcfast

#else
namespace ttcfast {
const KeyedTiles* keyed_tiles_avx2() { return nullptr; }
}  // namespace ttcfast
#endif
