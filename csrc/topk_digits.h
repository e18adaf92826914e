// The state of a row while the CUDA kernels of topk narrow it down: the leading digits of the k-th best score, and how many scores are
// above. A score's place is determined by its rank (rank_of(key_of(bits))), then its name (the id, mapped so that smaller ids are larger
// numbers), then its position. Digits are fixed from the top, first those of the rank and then, if ids are given, those of the name.
#pragma once

#include <cstdint>

#include "topk_key.h"

namespace ttcfast {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kNameBits = 64;

// All zero before the first digit.
struct Prefix {
    unsigned long long rank, name;  // the digits fixed so far, as one number each
    int rank_fixed, name_fixed;     // bits of them
    unsigned above, inside;         // scores whose digits are larger, and the same; valid once a digit is fixed
};

struct Digit {
    bool of_name;
    int bits, shift;
};

TTCFAST_BOTH unsigned long long shifted(unsigned long long x, int shift) { return shift >= 64 ? 0 : x >> shift; }

// Maps smaller ids to larger names.
TTCFAST_BOTH unsigned long long name_of(int64_t id) { return ~(static_cast<unsigned long long>(id) ^ 0x8000000000000000ull); }

// Whether all digits are fixed: scores inside then differ only by position.
TTCFAST_BOTH bool exhausted(const Prefix& p, int rank_bits, bool named) {
    return p.rank_fixed == rank_bits && (!named || p.name_fixed == kNameBits);
}

// Whether all scores above or inside fit into `room` places; they are then all taken and sorted.
TTCFAST_BOTH bool fits(const Prefix& p, unsigned room) { return p.rank_fixed > 0 && p.above + p.inside <= room; }

// The digit to fix next, of a prefix that is not exhausted.
TTCFAST_BOTH Digit next_digit(const Prefix& p, int rank_bits) {
    const bool of_name = p.rank_fixed == rank_bits;
    const int left = of_name ? kNameBits - p.name_fixed : rank_bits - p.rank_fixed;
    const int bits = left < kDigitBits ? left : kDigitBits;
    return {of_name, bits, left - bits};
}

// Fixes a digit: `bin` is its value, `above` counts scores inside with a larger one, `inside` those with the same.
TTCFAST_BOTH void fix(Prefix& p, const Digit& digit, unsigned bin, unsigned above, unsigned inside) {
    unsigned long long& number = digit.of_name ? p.name : p.rank;
    number = number << digit.bits | bin;
    (digit.of_name ? p.name_fixed : p.rank_fixed) += digit.bits;
    p.above += above;
    p.inside = inside;
}

// Digits that can be needed.
constexpr int most_digits(int rank_bits, bool named) {
    return (rank_bits + kDigitBits - 1) / kDigitBits + (named ? (kNameBits + kDigitBits - 1) / kDigitBits : 0);
}

}  // namespace ttcfast
