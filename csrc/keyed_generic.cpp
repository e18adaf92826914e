// Any processor, ARM64 among them: arrays and plain loops, which a compiler may turn into what SIMD it has.
#include "keyed_coefficients.h"
#include "keyed_tile.h"

namespace ttcfast {
namespace {

constexpr int kLanes = 8;

struct Wides {
    uint64_t lane[kLanes / 2];
};
struct Integers {
    uint32_t lane[kLanes];
};
struct Floats {
    float lane[kLanes];
};

template <class Vector, class Of>
inline Vector each(const Of& of) {
    Vector result;
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
    using Float = Floats;
    static constexpr const char* kName = "generic";
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
        return each<Int>([&](size_t i) { return std::min(a.lane[i], b.lane[i]); });
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
        return each<Float>([&](size_t i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
    }
    static Float root(const Float& a) {
        return each<Float>([&](size_t i) { return std::sqrt(a.lane[i]); });
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

#include "keyed_body.h"

}  // namespace

const KeyedTiles* keyed_tiles_generic() { return &kTiles; }

}  // namespace ttcfast
