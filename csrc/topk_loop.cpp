// The loops over scores of topk, compiled once per instruction set (level.h).
#include "topk_loop.h"

#include "simd.h"

namespace ttcfast {
namespace {

#ifdef TTCFAST_VECTORS
typedef int16_t Int16s __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32s __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64s __attribute__((vector_size(kVectorBytes)));
template <class Key>
using Keys = std::conditional_t<sizeof(Key) == 2, Int16s, std::conditional_t<sizeof(Key) == 4, Int32s, Int64s>>;

template <class Mask>
TTCFAST_INLINE bool some(Mask mask) {
    return any(reinterpret_cast<Words>(mask));
}
#else
template <class Key>
using Keys = Key;

TTCFAST_INLINE bool some(int64_t mask) { return mask != 0; }
#endif

template <class Key>
constexpr int64_t kLanesOf = sizeof(Keys<Key>) / sizeof(Key);

template <class To, class From>
TTCFAST_INLINE To load_as(const From* at) {
    To x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

// key_of, lane by lane.
template <class T>
TTCFAST_INLINE Keys<typename Score<T>::Key> keys_of(Keys<typename Score<T>::Key> bits) {
    using Key = typename Score<T>::Key;
    const Keys<Key> zero{}, magnitude = bits & static_cast<Key>(~kSign<Key>);
    const Keys<Key> key = bits < zero ? -magnitude : magnitude;
    return magnitude > zero + Score<T>::kInfinity ? zero + kNanKey<Key> : key;
}

template <class T>
TTCFAST_INLINE Keys<typename Score<T>::Key> load_keys(const T* at) {
    return keys_of<T>(load_as<Keys<typename Score<T>::Key>>(at));
}

// The type that `maxima` compares: float and double directly, in one instruction; NaN never exceeds the current maximum.
template <class T>
constexpr bool kAsNumbers = sizeof(T) >= 4;

template <class T>
TTCFAST_INLINE auto load_comparable(const T* at) {
    if constexpr (kAsNumbers<T>) {
        return load_as<Vector<T>>(at);
    } else {
        return load_keys(at);
    }
}

template <class V>
TTCFAST_INLINE V larger(V x, V best) {
    return x > best ? x : best;
}

template <class T>
void maxima(const T* scores, int64_t blocks, int64_t reach, typename Score<T>::Key* out) {
    using Key = typename Score<T>::Key;
    constexpr int64_t lanes = kLanesOf<Key>;
    using Comparable = decltype(load_comparable(scores));
    Comparable least = Comparable{};
    if constexpr (kAsNumbers<T>) {
        least = splat<T>(-static_cast<T>(INFINITY));
    } else {
        least = Comparable{} + static_cast<Key>(-Score<T>::kInfinity);
    }
    for (int64_t block = 0; block < blocks; ++block) {
        Comparable best[4] = {least, least, least, least};
        for (int64_t v = 0; v < reach; v += 4, scores += 4 * lanes) {
            unroll<4>([&](auto k) { best[k] = larger(load_comparable(scores + k * lanes), best[k]); });
        }
        const Comparable top = larger(larger(best[0], best[1]), larger(best[2], best[3]));
        Keys<Key> keys;
        if constexpr (kAsNumbers<T>) {
            keys = keys_of<T>(load_as<Keys<Key>>(&top));
        } else {
            keys = top;
        }
        std::memcpy(out + block * lanes, &keys, sizeof keys);
    }
}

template <class Key>
int64_t next_block(const Key* maxima, int64_t block, int64_t blocks, Key bound) {
    const Keys<Key> limit = Keys<Key>{} + bound;
    while (block < blocks && !some(load_as<Keys<Key>>(maxima + block * kLanesOf<Key>) > limit)) ++block;
    return block;
}

template <class T>
int64_t scan(const T* scores, int64_t n, typename Score<T>::Key bound, int64_t position, Candidate<typename Score<T>::Key>* out) {
    using Key = typename Score<T>::Key;
    constexpr int64_t lanes = kLanesOf<Key>;
    const Keys<Key> limit = Keys<Key>{} + bound;
    int64_t found = 0, i = 0;
    const auto take = [&](Key key, int64_t at) {
        out[found] = {key, position + at};
        found += key > bound;
    };
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
        Keys<Key> keys[4];
        unroll<4>([&](auto k) { keys[k] = load_keys(scores + i + k * lanes); });
        if (!some((keys[0] > limit) | (keys[1] > limit) | (keys[2] > limit) | (keys[3] > limit))) continue;
        for (int64_t v = 0; v < 4; ++v) {
            if (!some(keys[v] > limit)) continue;
            Key one[lanes];
            std::memcpy(one, &keys[v], sizeof one);
            for (int64_t lane = 0; lane < lanes; ++lane) take(one[lane], i + v * lanes + lane);
        }
    }
    for (; i < n; ++i) take(key_of<T>(load_as<Key>(scores + i)), i);
    return found;
}

template <class T>
void keys(const T* scores, int64_t n, int64_t stride, typename Score<T>::Key* out) {
    using Key = typename Score<T>::Key;
    constexpr int64_t lanes = kLanesOf<Key>;
    int64_t i = 0;
    for (; stride == 1 && i + lanes <= n; i += lanes) {
        const Keys<Key> k = load_keys(scores + i);
        std::memcpy(out + i, &k, sizeof k);
    }
    for (; i < n; ++i) out[i] = key_of<T>(load_as<Key>(scores + i * stride));
}

template <class Key>
void extremes(const Key* keys, int64_t n, Key* low, Key* high) {
    Key least = keys[0], most = keys[0];
    int64_t i = 0;
    if (constexpr int64_t lanes = kLanesOf<Key>; n >= lanes) {
        Keys<Key> small = load_as<Keys<Key>>(keys), large = small;
        for (; i + lanes <= n; i += lanes) {
            const Keys<Key> x = load_as<Keys<Key>>(keys + i);
            small = x < small ? x : small;
            large = larger(x, large);
        }
        Key one[2][lanes];
        std::memcpy(one[0], &small, sizeof small);
        std::memcpy(one[1], &large, sizeof large);
        for (int64_t lane = 0; lane < lanes; ++lane) {
            least = one[0][lane] < least ? one[0][lane] : least;
            most = one[1][lane] > most ? one[1][lane] : most;
        }
    }
    for (; i < n; ++i) {
        least = keys[i] < least ? keys[i] : least;
        most = keys[i] > most ? keys[i] : most;
    }
    *low = least;
    *high = most;
}

}  // namespace

template <class T, Level level>
TopkLoops<T> topk_loops() {
    using Key = typename Score<T>::Key;
    return {kLanesOf<Key>, maxima<T>, next_block<Key>, scan<T>, keys<T>, extremes<Key>};
}
template TopkLoops<float> topk_loops<float, kLevel>();
template TopkLoops<double> topk_loops<double, kLevel>();
template TopkLoops<bfloat16> topk_loops<bfloat16, kLevel>();
template TopkLoops<float16> topk_loops<float16, kLevel>();

}  // namespace ttcfast
