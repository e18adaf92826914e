// The loops over scores of topk, one version per instruction set.
#pragma once

#include <cstdint>

#include "level.h"
#include "topk_key.h"

namespace ttcfast {

constexpr int64_t kMostReach = 128;              // scores of a lane that share one maximum
constexpr int64_t kMostBlock = 32 * kMostReach;  // scores of a block of kMostReach vectors: of 64 bytes, with scores of 2

template <class Key>
struct Candidate {
    Key key;
    int64_t position;
};

// A block is `reach` consecutive vectors; lane i of all of them shares maximum i.
template <class T>
struct TopkLoops {
    using Key = typename Score<T>::Key;
    int64_t lanes;  // of a vector

    // maxima [blocks, lanes]: no key of the lane exceeds it, and one equals it, unless it is that of -infinity (then all may be NaN).
    void (*maxima)(const T* scores, int64_t blocks, int64_t reach, Key* maxima);
    // Returns the first block from `block` on with a maximum above the bound, or `blocks`.
    int64_t (*next_block)(const Key* maxima, int64_t block, int64_t blocks, Key bound);
    // Appends the scores whose key exceeds the bound, in order; returns their number. `out` has room for n + 1.
    int64_t (*scan)(const T* scores, int64_t n, Key bound, int64_t position, Candidate<Key>* out);
    void (*keys)(const T* scores, int64_t n, int64_t stride, Key* keys);
    void (*extremes)(const Key* keys, int64_t n, Key* low, Key* high);  // n >= 1
};

template <class T, Level level>
TopkLoops<T> topk_loops();

}  // namespace ttcfast
