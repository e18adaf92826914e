// Philox 4x32-10, Box-Muller and their uses, compiled once per instruction set (level.h). Every operation is an IEEE operation with
// explicit fma, so all instruction sets give the same bits.
#include "keyed_loop.h"

#include "keyed_lanes.h"

namespace ttcfast {
namespace {

// kernels/keyed.py repeats these constants; `python -m bench.fit_normal` prints the polynomials.
// -2 ln(1 + f) / f on [-1/2, 0], by rising powers of f; relative error 2.7e-8.
constexpr float kLog[9] = {-2.0f,         0.999990463f, -0.667264223f, 0.487365156f, -0.527382374f,
                           -0.361906648f, -2.41743279f, -3.2791853f,   -2.82909846f};
constexpr float kMinusTwoLn2 = -1.38629436f;
// x + x^3 (.. x^2 ..) and 1 + x^2 (.. x^2 ..) up to an eighth of a turn; relative errors 8.3e-9 and 4.6e-8.
constexpr float kSin[3] = {-0.166666552f, 0.0083321603f, -0.000195152825f};
constexpr float kCos[3] = {-0.499998838f, 0.0416557789f, -0.00135918532f};
constexpr float kTurn = 3.657295198e-10f;  // 2 pi / 2^34

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
constexpr int64_t kStretch = 1024;  // elements kept in the first-level cache between drawing and using them

struct Draws {
    Lanes::Wide w[4];  // in the low halves of the lanes; the high halves are undefined
};

// Philox's round keys, and the halves of the first two rounds that do not depend on the element.
struct Schedule {
    Lanes::Wide key[10][2];
    Lanes::Wide first, second, fourth, product;

    explicit Schedule(const RowKey& row) {
        // Two loops: g++ 12 -O3 makes the second key a copy of the first if it vectorises both sums in one.
        for (uint32_t round = 0; round < 10; ++round) key[round][0] = Lanes::wide(row.key[0] + round * kWeyl0);
        for (uint32_t round = 0; round < 10; ++round) key[round][1] = Lanes::wide(row.key[1] + round * kWeyl1);
        const uint64_t p1 = static_cast<uint64_t>(row.candidate[1]) * kMultiplier1;
        const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ row.candidate[0] ^ row.key[0];
        const uint64_t p0 = static_cast<uint64_t>(c0) * kMultiplier0;
        first = Lanes::wide(static_cast<uint32_t>(p1) ^ (row.key[0] + kWeyl0));
        second = Lanes::wide(row.problem ^ row.key[1]);
        fourth = Lanes::wide(static_cast<uint32_t>(p0));
        product = Lanes::wide(static_cast<uint32_t>(p0 >> 32) ^ (row.key[1] + kWeyl1));
    }
};

// The words of `sets` times kCounters counters starting at `group`. Several sets hide the latency of the multiplications.
template <int sets>
inline void philox(const Schedule& s, uint32_t group, Draws (&out)[sets]) {
    const Lanes::Wide m0 = Lanes::wide(kMultiplier0), m1 = Lanes::wide(kMultiplier1);
    Lanes::Wide c[sets][4];
    for (int i = 0; i < sets; ++i) {
        const Lanes::Wide p0 = Lanes::multiply(Lanes::counters(group + i * Lanes::kCounters), m0);
        const Lanes::Wide p1 = Lanes::multiply(Lanes::high(p0) ^ s.second, m1);
        c[i][0] = Lanes::high(p1) ^ s.first;
        c[i][1] = p1;
        c[i][2] = p0 ^ s.product;
        c[i][3] = s.fourth;
    }
    for (int round = 2; round < 10; ++round) {
        for (int i = 0; i < sets; ++i) {
            const Lanes::Wide p0 = Lanes::multiply(c[i][0], m0), p1 = Lanes::multiply(c[i][2], m1);
            // Operands available early are combined first: the products are on the critical path.
            c[i][0] = Lanes::high(p1) ^ (c[i][1] ^ s.key[round][0]);
            c[i][2] = Lanes::high(p0) ^ (c[i][3] ^ s.key[round][1]);
            c[i][1] = p1;
            c[i][3] = p0;
        }
    }
    for (int i = 0; i < sets; ++i)
        for (int k = 0; k < 4; ++k) out[i].w[k] = c[i][k];
}

// Two normals per pair of integers: radius sqrt(-2 ln((a + 1/2) / 2^32)), angle 2 pi (b + 1/2) / 2^32.
// Polynomials: least maximal relative error, by bench/fit_normal.py.
inline void box_muller(Lanes::Int a, Lanes::Int b, Lanes::Int sign, Lanes::Float& first, Lanes::Float& second) {
    using L = Lanes;
    // The smaller of u and 1 - u, in units of 2^-32, so that -ln u keeps its digits near u = 1, where it is -ln(1 - t).
    const L::Float t = L::add(L::to_float(L::least(a, ~a)), L::all(0.5f));
    const L::Int bits = L::bits(t);
    const L::Float mantissa = L::add(L::number((bits & L::all(0x007fffffu)) | L::all(0x3f000000u)), L::all(-1.0f));
    const L::Float exponent = L::to_float(L::sum(L::exponent(bits), L::all(static_cast<uint32_t>(-158))));
    const L::Float f = L::choose(a, L::times(t, L::all(-0x1p-32f)), mantissa);  // in [-1/2, 0)
    const L::Float f2 = L::times(f, f);  // separate even and odd powers, which halves the chain of dependent steps
    L::Float even = L::all(kLog[8]), odd = L::all(kLog[7]);
    for (int k = 6; k >= 0; k -= 2) even = L::fma(even, f2, L::all(kLog[k]));
    for (int k = 5; k >= 1; k -= 2) odd = L::fma(odd, f2, L::all(kLog[k]));
    const L::Float q = L::fma(odd, f, even);
    const L::Float square = L::fma(L::choose(a, L::all(0.0f), exponent), L::all(kMinusTwoLn2), L::times(f, q));
    const L::Float radius = L::number(L::bits(L::root(square)) ^ sign);

    // A quarter turn is 2^30: the remainder of b within an eighth of a turn is its low 30 bits, as a signed number.
    const L::Float x = L::fma(L::to_float(L::left2(b)), L::all(kTurn), L::all(2 * kTurn));
    const L::Float x2 = L::times(x, x);
    L::Float sine = L::fma(L::all(kSin[2]), x2, L::all(kSin[1]));
    sine = L::fma(L::fma(sine, x2, L::all(kSin[0])), L::times(x, x2), x);
    L::Float cosine = L::fma(L::all(kCos[2]), x2, L::all(kCos[1]));
    cosine = L::fma(L::fma(cosine, x2, L::all(kCos[0])), x2, L::all(1.0f));
    const L::Int quarter = L::sum(b, L::all(0x20000000u)), swap = L::left1(quarter), top = L::all(0x80000000u);
    const L::Int next = L::sum(quarter, L::all(0x40000000u));
    first = L::times(radius, L::number(L::bits(L::choose(swap, sine, cosine)) ^ (next & top)));
    second = L::times(radius, L::number(L::bits(L::choose(swap, cosine, sine)) ^ (quarter & top)));
}

// Draws `n` elements block by block; use(words of a set, destination) stores those of one set. The last block may be short.
template <int sets, class T, class Use>
inline void draw(const RowKey& row, int64_t first, int64_t n, T* out, const Use& use) {
    constexpr int kSet = 4 * Lanes::kCounters, kBlock = sets * kSet;
    const Schedule schedule(row);
    for (int64_t start = 0; start < n; start += kBlock) {
        Draws words[sets];
        philox(schedule, static_cast<uint32_t>((first + start) / 4), words);
        if (n - start >= kBlock) {
            for (int i = 0; i < sets; ++i) use(words[i], out + start + i * kSet);
        } else {
            T rest[kBlock];
            for (int i = 0; i < sets; ++i) use(words[i], rest + i * kSet);
            std::memcpy(out + start, rest, (n - start) * sizeof(T));
        }
    }
}

inline void draw_words(const RowKey& row, int64_t first, int64_t n, uint32_t* out) {
    const Lanes::Int flip = Lanes::all(row.flip);
    draw<4>(row, first, n, out, [&](const Draws& words, uint32_t* to) {
        Lanes::store_joined(Lanes::pair(words.w[0], words.w[1]) ^ flip, Lanes::pair(words.w[2], words.w[3]) ^ flip, to);
    });
}

inline void draw_normals(const RowKey& row, int64_t first, int64_t n, float* out) {
    const Lanes::Int sign = Lanes::all(row.flip & 0x80000000u);
    draw<2>(row, first, n, out, [&](const Draws& words, float* to) {
        Lanes::Float even, odd;
        box_muller(Lanes::pair(words.w[0], words.w[2]), Lanes::pair(words.w[1], words.w[3]), sign, even, odd);
        Lanes::store_interleaved(even, odd, to);
    });
}

// Returns `x`, or 0 unless `keep`; bitwise, to avoid branches.
inline bfloat16 kept(bool keep, bfloat16 x) { return {static_cast<uint16_t>(x.bits & -static_cast<int>(keep))}; }
inline float kept(bool keep, float x) { return keep ? x : 0.0f; }
inline double kept(bool keep, double x) { return keep ? x : 0.0; }
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return fma(a, b, c); }

// Calls use(start, length) for runs of n elements that fit the L1 cache.
template <class Use>
inline void for_stretches(int64_t n, const Use& use) {
    for (int64_t start = 0; start < n; start += kStretch) use(start, n - start < kStretch ? n - start : kStretch);
}

}  // namespace

template <Level level>
void keyed_words(const RowKey& row, int64_t first, int64_t n, uint32_t* out) {
    draw_words(row, first, n, out);
}

template <class T, Level level>
void normal_tile(const RowKey& row, int64_t first, int64_t n, T* out) {
    if constexpr (std::is_same_v<T, float>) return draw_normals(row, first, n, out);
    float draws[kStretch];
    for_stretches(n, [&](int64_t start, int64_t length) {
        draw_normals(row, first + start, length, draws);
        for (int64_t i = 0; i < length; ++i) narrow(AccumulatorOf<T>(draws[i]), out[start + i]);
    });
}

template <class T, Level level>
void add_noise_tile(const RowKey& row, int64_t first, int64_t n, const T* x, double sigma, T* out) {
    using Acc = AccumulatorOf<T>;
    const Acc scale = static_cast<Acc>(sigma);
    float draws[kStretch];
    for_stretches(n, [&](int64_t start, int64_t length) {
        draw_normals(row, first + start, length, draws);
        for (int64_t i = 0; i < length; ++i) narrow(fused(scale, Acc(draws[i]), widen(x[start + i])), out[start + i]);
    });
}

template <class T, Level level>
void dropout_tile(const RowKey& row, int64_t first, int64_t n, const T* x, uint32_t threshold, double scale, T* out) {
    const AccumulatorOf<T> factor = static_cast<AccumulatorOf<T>>(scale);
    uint32_t draws[kStretch];
    for_stretches(n, [&](int64_t start, int64_t length) {
        draw_words(row, first + start, length, draws);
        for (int64_t i = 0; i < length; ++i) {
            T scaled;
            narrow(widen(x[start + i]) * factor, scaled);
            out[start + i] = kept(draws[i] >= threshold, scaled);
        }
    });
}

template void keyed_words<kLevel>(const RowKey&, int64_t, int64_t, uint32_t*);
#define TTCFAST_TILES(T)                                                                            \
    template void normal_tile<T, kLevel>(const RowKey&, int64_t, int64_t, T*);                      \
    template void add_noise_tile<T, kLevel>(const RowKey&, int64_t, int64_t, const T*, double, T*); \
    template void dropout_tile<T, kLevel>(const RowKey&, int64_t, int64_t, const T*, uint32_t, double, T*);
TTCFAST_TILES(float)
TTCFAST_TILES(double)
TTCFAST_TILES(bfloat16)

}  // namespace ttcfast
