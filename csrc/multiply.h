// Products of small matrices, for the loops that are compiled once per instruction set (level.h). Every entry is a sum over k in order,
// one multiplication and one addition at a time, so instruction sets, numbers of rows and of threads do not change its bits.
#pragma once

#include "simd.h"

namespace ttcfast {
namespace {

#if defined(TTCFAST_VECTORS) && defined(__AVX512F__)
constexpr int kTileRows = 8;  // sums in registers: kTileRows x 2 vectors, of 32, 16 and 16 registers
#elif defined(TTCFAST_VECTORS) && defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int64_t kDepth = 256;  // terms of a sum at a time: so much of a tile's columns of b fits in the first cache

// The matrix whose entry (i, k) is at[i * row + k * column].
template <class T>
struct Matrix {
    const T* at;
    int64_t row, column;
};

// c = from + a b for a tile of `rows` x `vectors` vectors; b, from and c have unit column stride.
template <int rows, int vectors, class T>
TTCFAST_INLINE void tile(int64_t depth, Matrix<T> a, const T* b, int64_t b_row, const T* from, int64_t from_row, T* c, int64_t c_row) {
    using V = Vector<T>;
    V sums[rows][vectors];
    unroll<rows>([&](auto i) { unroll<vectors>([&](auto j) { sums[i][j] = load(from + i * from_row + j * kWidth<T>); }); });
    for (int64_t k = 0; k < depth; ++k) {
        V of_b[vectors];
        unroll<vectors>([&](auto j) { of_b[j] = load(b + k * b_row + j * kWidth<T>); });
        unroll<rows>([&](auto i) {
            const V x = splat<T>(a.at[i * a.row + k * a.column]);
            unroll<vectors>([&](auto j) { sums[i][j] = sums[i][j] + x * of_b[j]; });
        });
    }
    unroll<rows>([&](auto i) { unroll<vectors>([&](auto j) { store<T>(c + i * c_row + j * kWidth<T>, sums[i][j]); }); });
}

// The same for `rows` <= kTileRows.
template <int vectors, class T>
TTCFAST_INLINE void rows_of_tile(int64_t rows, int64_t depth, Matrix<T> a, const T* b, int64_t b_row, const T* from, int64_t from_row, T* c,
                                 int64_t c_row) {
    if (rows == kTileRows) return tile<kTileRows, vectors>(depth, a, b, b_row, from, from_row, c, c_row);
    for (int64_t i = 0; i < rows; ++i) {
        tile<1, vectors>(depth, Matrix<T>{a.at + i * a.row, 0, a.column}, b, b_row, from + i * from_row, 0, c + i * c_row, 0);
    }
}

// The same for `columns` <= kWidth, by a tile beside c.
template <class T>
TTCFAST_INLINE void edge(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, const T* b, int64_t b_row, const T* from,
                         int64_t from_row, T* c, int64_t c_row) {
    T beside[kTileRows * kWidth<T>];
    const size_t bytes = static_cast<size_t>(columns) * sizeof(T);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = columns; j < kWidth<T>; ++j) beside[i * kWidth<T> + j] = 0;
        std::memcpy(beside + i * kWidth<T>, from + i * from_row, bytes);
    }
    rows_of_tile<1>(rows, depth, a, b, b_row, beside, kWidth<T>, beside, kWidth<T>);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(c + i * c_row, beside + i * kWidth<T>, bytes);
}

// c [m, n] = from + a b with a [m, k] and b [k, n]; b, from and c have unit column stride. `from` may be c, or one row with stride 0.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, Matrix<T> a, const T* b, int64_t b_row, const T* from, int64_t from_row, T* c,
              int64_t c_row) {
    constexpr int64_t one = kWidth<T>;
    T last[kDepth * one];  // the last columns of b, filled up with zeros
    for (int64_t start = 0; start == 0 || start < k; start += kDepth) {
        const int64_t depth = k - start < kDepth ? k - start : kDepth, before_row = start ? c_row : from_row;
        int64_t columns = 0;
        for (int64_t j = 0; j < n; j += columns) {
            columns = n - j >= 2 * one ? 2 * one : n - j < one ? n - j : one;
            const T* right = b + start * b_row + j;
            if (columns < one) {
                for (int64_t t = 0; t < depth; ++t) {
                    for (int64_t i = 0; i < columns; ++i) last[t * one + i] = right[t * b_row + i];
                    for (int64_t i = columns; i < one; ++i) last[t * one + i] = 0;
                }
            }
            for (int64_t i = 0; i < m; i += kTileRows) {
                const Matrix<T> left{a.at + start * a.column + i * a.row, a.row, a.column};
                const int64_t rows = m - i < kTileRows ? m - i : kTileRows;
                const T* before = start ? c + i * c_row + j : from + i * from_row + j;
                T* to = c + i * c_row + j;
                if (columns == 2 * one) {
                    rows_of_tile<2>(rows, depth, left, right, b_row, before, before_row, to, c_row);
                } else if (columns == one) {
                    rows_of_tile<1>(rows, depth, left, right, b_row, before, before_row, to, c_row);
                } else {
                    edge(rows, columns, depth, left, last, one, before, before_row, to, c_row);
                }
            }
        }
    }
}

}  // namespace
}  // namespace ttcfast
