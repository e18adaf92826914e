// The total order of topk as integers, for the C++ and the CUDA implementation: a larger key comes first.
#pragma once

#include <cstdint>

#include "dtype.h"

#ifdef __CUDACC__
#define TTCFAST_BOTH __host__ __device__ __forceinline__
#else
#define TTCFAST_BOTH inline
#endif

namespace ttcfast {

// Key: a signed integer of the score's size. kInfinity: the bits of infinity, exceeded by the magnitude bits of every NaN.
template <class T>
struct Score;
template <>
struct Score<float> {
    using Key = int32_t;
    static constexpr Key kInfinity = 0x7f800000;
};
template <>
struct Score<double> {
    using Key = int64_t;
    static constexpr Key kInfinity = 0x7ff0000000000000;
};
template <>
struct Score<bfloat16> {
    using Key = int16_t;
    static constexpr Key kInfinity = 0x7f80;
};
template <>
struct Score<float16> {
    using Key = int16_t;
    static constexpr Key kInfinity = 0x7c00;
};

template <class Key>
constexpr Key kSign = static_cast<Key>(static_cast<uint64_t>(1) << (8 * sizeof(Key) - 1));  // the smallest number
template <class Key>
constexpr Key kBelowAll = kSign<Key>;  // every key exceeds it
template <class Key>
constexpr Key kNanKey = kSign<Key> + 1;  // below that of -infinity

// Converts sign and magnitude to two's complement, so that both zeros are 0 and larger scores are larger numbers.
template <class T>
TTCFAST_BOTH typename Score<T>::Key key_of(typename Score<T>::Key bits) {
    using Key = typename Score<T>::Key;
    const Key magnitude = bits & static_cast<Key>(~kSign<Key>);
    if (magnitude > Score<T>::kInfinity) return kNanKey<Key>;
    return bits < 0 ? static_cast<Key>(-magnitude) : magnitude;
}

// Unsigned numbers in the order of the keys, for histograms of their digits.
template <class Key>
TTCFAST_BOTH uint64_t rank_of(Key key) {
    return static_cast<uint64_t>(static_cast<int64_t>(key)) - static_cast<uint64_t>(static_cast<int64_t>(kSign<Key>));
}

}  // namespace ttcfast
