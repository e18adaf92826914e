// Products of small matrices, for the loops that are compiled once per instruction set (level.h). Every entry is a sum over k in order,
// one multiplication and one addition at a time, so instruction sets, numbers of rows and of threads do not change its bits.
#pragma once

#include "simd.h"

namespace ttcfast {
namespace {

#if defined(TTCFAST_VECTORS) && defined(__AVX512F__)
constexpr int kTileRows = 8;  // sums in registers: kTileRows x 2 vectors, of 32, 16 and 16
#elif defined(TTCFAST_VECTORS) && defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
template <class T>
constexpr int64_t kTileColumns = 2 * kWidth<T>;
constexpr int64_t kDepth = 256;  // terms of a sum at a time: so much of a tile's columns of b fits in the first cache

// The matrix whose entry (i, k) is at[i * row + k * column].
template <class T>
struct Matrix {
    const T* at;
    int64_t row, column;
};

// c = from + a b for a tile of `rows` x kTileColumns; b, from and c have unit column stride.
template <int rows, class T>
TTCFAST_INLINE void tile(int64_t depth, Matrix<T> a, const T* b, int64_t b_row, const T* from, int64_t from_row, T* c, int64_t c_row) {
    using V = Vector<T>;
    V sums[rows][2];
    unroll<rows>([&](auto i) { unroll<2>([&](auto j) { sums[i][j] = load(from + i * from_row + j * kWidth<T>); }); });
    for (int64_t k = 0; k < depth; ++k) {
        const V b0 = load(b + k * b_row), b1 = load(b + k * b_row + kWidth<T>);
        unroll<rows>([&](auto i) {
            const V x = splat<T>(a.at[i * a.row + k * a.column]);
            sums[i][0] = sums[i][0] + x * b0;
            sums[i][1] = sums[i][1] + x * b1;
        });
    }
    unroll<rows>([&](auto i) { unroll<2>([&](auto j) { store<T>(c + i * c_row + j * kWidth<T>, sums[i][j]); }); });
}

// The same for `rows` <= kTileRows and `columns` <= kTileColumns, by a tile beside c.
template <class T>
TTCFAST_INLINE void edge(int64_t rows, int64_t columns, int64_t depth, Matrix<T> a, const T* b, int64_t b_row, const T* from,
                         int64_t from_row, T* c, int64_t c_row) {
    T beside[kTileRows * kTileColumns<T>];
    const size_t bytes = static_cast<size_t>(columns) * sizeof(T);
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = columns; j < kTileColumns<T>; ++j) beside[i * kTileColumns<T> + j] = 0;
        std::memcpy(beside + i * kTileColumns<T>, from + i * from_row, bytes);
    }
    if (rows == kTileRows) {
        tile<kTileRows>(depth, a, b, b_row, beside, kTileColumns<T>, beside, kTileColumns<T>);
    } else {
        for (int64_t i = 0; i < rows; ++i) {
            T* row = beside + i * kTileColumns<T>;
            tile<1>(depth, Matrix<T>{a.at + i * a.row, 0, a.column}, b, b_row, row, 0, row, 0);
        }
    }
    for (int64_t i = 0; i < rows; ++i) std::memcpy(c + i * c_row, beside + i * kTileColumns<T>, bytes);
}

// c [m, n] = from + a b with a [m, k] and b [k, n]; b, from and c have unit column stride. `from` may be c, or one row with stride 0.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, Matrix<T> a, const T* b, int64_t b_row, const T* from, int64_t from_row, T* c,
              int64_t c_row) {
    constexpr int64_t wide = kTileColumns<T>;
    T last[kDepth * wide];  // the last columns of b, filled up with zeros
    for (int64_t start = 0; start == 0 || start < k; start += kDepth) {
        const int64_t depth = k - start < kDepth ? k - start : kDepth;
        const Matrix<T> part{a.at + start * a.column, a.row, a.column};
        for (int64_t j = 0; j < n; j += wide) {
            const int64_t columns = n - j < wide ? n - j : wide;
            const T* right = b + start * b_row + j;
            int64_t right_row = b_row;
            if (columns < wide) {
                for (int64_t t = 0; t < depth; ++t) {
                    for (int64_t i = 0; i < columns; ++i) last[t * wide + i] = right[t * b_row + i];
                    for (int64_t i = columns; i < wide; ++i) last[t * wide + i] = 0;
                }
                right = last;
                right_row = wide;
            }
            for (int64_t i = 0; i < m; i += kTileRows) {
                const Matrix<T> left{part.at + i * a.row, a.row, a.column};
                const int64_t rows = m - i < kTileRows ? m - i : kTileRows;
                const T* before = start ? c + i * c_row + j : from + i * from_row + j;
                const int64_t before_row = start ? c_row : from_row;
                if (rows == kTileRows && columns == wide) {
                    tile<kTileRows>(depth, left, right, right_row, before, before_row, c + i * c_row + j, c_row);
                } else {
                    edge(rows, columns, depth, left, right, right_row, before, before_row, c + i * c_row + j, c_row);
                }
            }
        }
    }
}

}  // namespace
}  // namespace ttcfast
