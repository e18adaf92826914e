// Selection among keys in memory, and sorting of the selected ones. Independent of the instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "topk_loop.h"

namespace ttcfast {

constexpr int kMostDigits = 11;  // bits of a histogram's digit: 2048 counters fit the L1 cache

inline int bits_in(uint64_t x) {
    int bits = 0;
    for (; x != 0; x >>= 1) ++bits;
    return bits;
}

constexpr int64_t kExactly = -1;  // as slack

// The k-th largest of n keys, 1 <= k <= n, or a smaller number that at most `slack` further keys reach. The number may
// equal no key, even with a slack of 0, except with kExactly. `scratch` has room for n and may be `keys`, which is then overwritten. Each
// round takes a histogram over the range of the remaining keys, so common leading bits cost nothing, and continues in the bin of the k-th:
// at most one round per 11 bits, for any input. `counts` has room for 2^kMostDigits.
template <class Key, class Extremes>
Key kth_largest(const Key* keys, int64_t n, int64_t k, int64_t slack, Key* scratch, int64_t* counts, const Extremes& extremes) {
    using Word = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;
    for (;;) {
        Key low, high;
        extremes(keys, n, &low, &high);
        if (k == 1 || low == high) return high;
        if (k == n) return low;
        const Word base = static_cast<Word>(low), range = static_cast<Word>(high) - base;
        const int bits = bits_in(range), digits = std::min({bits, kMostDigits, std::max(bits_in(static_cast<uint64_t>(n)), 4)});
        const int shift = bits - digits;
        const auto bin_of = [&](Key key) { return static_cast<int64_t>((static_cast<Word>(key) - base) >> shift); };
        std::fill_n(counts, static_cast<int64_t>(1) << digits, 0);
        for (int64_t i = 0; i < n; ++i) ++counts[bin_of(keys[i])];
        int64_t bin = bin_of(high);
        for (; counts[bin] < k; --bin) k -= counts[bin];
        if (shift == 0 || counts[bin] - k <= slack) return static_cast<Key>(base + (static_cast<Word>(bin) << shift));
        int64_t left = 0;
        for (int64_t i = 0; i < n; ++i) {
            const Key key = keys[i];
            scratch[left] = key;
            left += bin_of(key) == bin;
        }
        keys = scratch;
        n = left;
    }
}

// Sorts largest key first; equal keys keep their order. `other` has room for n, `start` for
// 2^kMostDigits.
template <class Key>
void sort_by_key(Candidate<Key>* items, int64_t n, Candidate<Key>* other, int64_t* start) {
    constexpr int64_t few = 24;
    if (n <= few) {
        for (int64_t i = 1; i < n; ++i) {
            const Candidate<Key> item = items[i];
            int64_t at = i;
            for (; at > 0 && items[at - 1].key < item.key; --at) items[at] = items[at - 1];
            items[at] = item;
        }
        return;
    }
    using Word = std::make_unsigned_t<Key>;
    Key low = items[0].key, high = low;
    for (int64_t i = 1; i < n; ++i) {
        low = std::min(low, items[i].key);
        high = std::max(high, items[i].key);
    }
    const auto below = [high](Key key) { return static_cast<Word>(static_cast<Word>(high) - static_cast<Word>(key)); };
    // Digits as long as the number of items justifies, all of the same length.
    const int bits = bits_in(below(low)), most = n < 512 ? 7 : kMostDigits, passes = (bits + most - 1) / most;
    const int digits = passes == 0 ? 0 : (bits + passes - 1) / passes;
    const Word mask = static_cast<Word>((static_cast<Word>(1) << digits) - 1);
    Candidate<Key>* from = items;
    for (int pass = 0, shift = 0; pass < passes; ++pass, shift += digits) {
        std::fill_n(start, static_cast<int64_t>(mask) + 1, 0);
        for (int64_t i = 0; i < n; ++i) ++start[below(from[i].key) >> shift & mask];
        int64_t sum = 0;
        for (int64_t bin = 0; bin <= static_cast<int64_t>(mask); ++bin) sum += std::exchange(start[bin], sum);
        for (int64_t i = 0; i < n; ++i) other[start[below(from[i].key) >> shift & mask]++] = from[i];
        std::swap(from, other);
    }
    if (from != items) std::copy(from, from + n, items);
}

// The ids of one row; without ids, positions serve as ids, and those of candidates already ascend.
struct RowIds {
    const int64_t* data;
    int64_t stride;

    explicit operator bool() const { return data != nullptr; }
    int64_t operator[](int64_t position) const { return data[position * stride]; }

    // Whether the score at position a comes before an equal one at position b.
    bool before(int64_t a, int64_t b) const {
        const int64_t first = (*this)[a], second = (*this)[b];
        return first < second || (first == second && a < b);
    }
};

// Sorts candidates of one key, adjacent after sort_by_key, by their ids.
template <class Key>
void sort_ties(Candidate<Key>* items, int64_t n, const RowIds& ids) {
    for (int64_t first = 0, last; first < n; first = last) {
        for (last = first + 1; last < n && items[last].key == items[first].key; ++last) {
        }
        if (last - first > 1) {
            std::sort(items + first, items + last,
                      [&](const Candidate<Key>& a, const Candidate<Key>& b) { return ids.before(a.position, b.position); });
        }
    }
}

}  // namespace ttcfast
