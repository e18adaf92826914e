// The rows of norm_mish, compiled once per instruction set (level.h).
#include <math.h>

#include <cstring>

#include "norm_mish.h"

namespace ttcfast {
namespace {

constexpr int kLanes = 16;         // partial sums per row; fixes the order of additions for every SIMD width
constexpr int kMostExponent = 20;  // above this, mish(x) = x to the last bit of a double

// e^x for x <= 20: polynomial of degree 6 on [-ln2/2, ln2/2] (Cephes' expf), 2^n by its bits; within 2 ulp. 0 below -87.
TTCFAST_INLINE float exponential(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    const float shifted = x * 1.44269504f + kRound;
    const float whole = shifted - kRound;
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    uint32_t n;
    std::memcpy(&n, &shifted, sizeof n);
    const uint32_t power = (n - 0x4B400000u + 127u) << 23;
    float two_to_n;
    std::memcpy(&two_to_n, &power, sizeof two_to_n);
    return x < -87.0f ? 0.0f : p * two_to_n;  // not e^-87: compilers evaluate both sides, and products with it are subnormal and slow
}
TTCFAST_INLINE double exponential(double x) { return exp(x); }

TTCFAST_INLINE float square_root(float x) { return sqrtf(x); }
TTCFAST_INLINE double square_root(double x) { return sqrt(x); }

// mish(x) = x tanh(log(1 + e^x)) = x n / (n + 2) with n = e^x (e^x + 2): no difference of close numbers, one division.
template <class T>
struct Mish {
    T gate;   // mish(x) / x
    T slope;  // mish'(x)
};

template <class T>
TTCFAST_INLINE Mish<T> mish(T x) {
    const T w = exponential(x < T(kMostExponent) ? x : T(kMostExponent));
    const T n = w * (w + 2), inverse = 1 / (n + 2), gate = n * inverse;
    return {gate, gate + x * (4 * w * (w + 1) * inverse * inverse)};
}

template <class T>
TTCFAST_INLINE T sum(const T* v, int64_t n) {
    T lanes[kLanes] = {}, total = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += v[i + lane];
    }
    for (int lane = 0; i + lane < n; ++lane) lanes[lane] += v[i + lane];
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

template <class T>
TTCFAST_INLINE T dot(const T* a, const T* b, int64_t n) {
    T lanes[kLanes] = {}, total = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    }
    for (int lane = 0; i + lane < n; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    return total;
}

// u = x + rows + bias
template <class T>
TTCFAST_INLINE void add(const NormMishLayer<T>& layer, const T* x, const T* rows, T* __restrict u) {
    const T* bias = layer.bias;
    if (rows) {
        for (int64_t i = 0; i < layer.width; ++i) u[i] = x[i] + rows[i] + bias[i];
    } else {
        for (int64_t i = 0; i < layer.width; ++i) u[i] = x[i] + bias[i];
    }
}

// Loops that contain an exponential. Outputs do not overlap inputs, which the compiler must be told.
template <class T>
TTCFAST_INLINE void write_mish(const T* __restrict hat, const T* __restrict scale, const T* __restrict shift, int64_t width,
                               T* __restrict y) {
    for (int64_t i = 0; i < width; ++i) {
        const T normal = hat[i] * scale[i] + shift[i];
        y[i] = normal * mish(normal).gate;
    }
}

template <class T>
TTCFAST_INLINE void write_slope(const T* __restrict hat, const T* __restrict scale, const T* __restrict shift, const T* __restrict grad,
                                int64_t width, T* __restrict inner) {
    for (int64_t i = 0; i < width; ++i) inner[i] = grad[i] * mish(hat[i] * scale[i] + shift[i]).slope;
}

template <class T>
TTCFAST_INLINE void write_both(const T* __restrict hat, const T* __restrict scale, const T* __restrict shift, const T* __restrict grad,
                               int64_t width, T* __restrict inner, T* __restrict y) {
    for (int64_t i = 0; i < width; ++i) {
        const T normal = hat[i] * scale[i] + shift[i];
        const Mish<T> m = mish(normal);
        inner[i] = grad[i] * m.slope;
        y[i] = normal * m.gate;
    }
}

// `work` has room for one row.
template <class T>
TTCFAST_INLINE void forward_row(const NormMishLayer<T>& layer, const T* x, const T* rows, T* __restrict work, T* y, T* stats) {
    const int64_t width = layer.width;
    add(layer, x, rows, work);
    const T mean = sum(work, width) / static_cast<T>(width);
    for (int64_t i = 0; i < width; ++i) work[i] -= mean;
    const T rstd = 1 / square_root(dot(work, work, width) / static_cast<T>(width) + layer.eps);
    for (int64_t i = 0; i < width; ++i) work[i] *= rstd;
    write_mish(work, layer.scale, layer.shift, width, y);
    stats[0] = mean;
    stats[1] = rstd;
}

// Adds one row's gradients of scale and shift to `parameters` [2, width] if that is not null; `work` has room for two rows.
template <class T>
TTCFAST_INLINE void backward_row(const NormMishLayer<T>& layer, const T* x, const T* rows, const T* grad, const T* stats,
                                 T* __restrict work, T* __restrict grad_x, T* y, T* __restrict parameters) {
    const int64_t width = layer.width;
    const T mean = stats[0], rstd = stats[1];
    const T* scale = layer.scale;
    T* __restrict hat = work, * __restrict inner = work + width;
    add(layer, x, rows, hat);
    for (int64_t i = 0; i < width; ++i) hat[i] = (hat[i] - mean) * rstd;
    if (y) {
        write_both(hat, scale, layer.shift, grad, width, inner, y);
    } else {
        write_slope(hat, scale, layer.shift, grad, width, inner);
    }
    if (parameters) {
        for (int64_t i = 0; i < width; ++i) parameters[i] += inner[i] * hat[i];
        for (int64_t i = 0; i < width; ++i) parameters[width + i] += inner[i];
    }
    for (int64_t i = 0; i < width; ++i) inner[i] *= scale[i];
    const T level = sum(inner, width) / static_cast<T>(width), along = dot(inner, hat, width) / static_cast<T>(width);
    for (int64_t i = 0; i < width; ++i) grad_x[i] = rstd * (inner[i] - level - hat[i] * along);
}

}  // namespace

template <class T, Level level>
void norm_mish_rows(const NormMishBlock<T>& b) {
    const int64_t width = b.layer.width;
    for (int64_t r = 0; r < b.count; ++r) {
        forward_row(b.layer, b.x + r * width, b.rows ? b.rows + r * width : nullptr, b.work, b.y + r * width, b.stats + 2 * r);
    }
}

template <class T, Level level>
void norm_mish_rows_backward(const NormMishBlock<T>& b) {
    const int64_t width = b.layer.width;
    for (int64_t r = 0; r < b.count; ++r) {
        const int64_t at = r * width;
        backward_row(b.layer, b.x + at, b.rows ? b.rows + at : nullptr, b.grad + at, b.stats + 2 * r, b.work, b.grad_x + at,
                     b.y ? b.y + at : nullptr, b.parameters);
    }
}

template void norm_mish_rows<float, kLevel>(const NormMishBlock<float>&);
template void norm_mish_rows<double, kLevel>(const NormMishBlock<double>&);
template void norm_mish_rows_backward<float, kLevel>(const NormMishBlock<float>&);
template void norm_mish_rows_backward<double, kLevel>(const NormMishBlock<double>&);

}  // namespace ttcfast
