#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "norm_mish.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int kLanes = 16;                 // partial sums per row; fixes the order of additions for every SIMD width
constexpr int64_t kBlock = 32;             // rows per work item; sums over rows are per block, so threads change no bit
constexpr int64_t kSerialBelow = 1 << 16;  // numbers under which starting a thread costs more than it saves
constexpr int kMostExponent = 20;          // beyond it mish(x) = x to the last bit of a double

// e^x for x <= 20. A polynomial of degree 6 on [-ln2/2, ln2/2] (Cephes' expf), 2^n by its bits; within 2 ulp. 0 below -87.
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
    return x < -87.0f ? 0.0f : p * two_to_n;  // not e^-87: compilers work out both sides, and products with it are subnormal and slow
}
TTCFAST_INLINE double exponential(double x) { return std::exp(x); }

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

template <class T>
struct Layer {
    int64_t width;
    const T *bias, *scale, *shift;
    T eps;
};

// u = x + rows + bias
template <class T>
TTCFAST_INLINE void add(const Layer<T>& layer, const T* x, const T* rows, T* __restrict u) {
    const T* bias = layer.bias;
    if (rows) {
        for (int64_t i = 0; i < layer.width; ++i) u[i] = x[i] + rows[i] + bias[i];
    } else {
        for (int64_t i = 0; i < layer.width; ++i) u[i] = x[i] + bias[i];
    }
}

// Loops whose body holds an exponential: what they write overlaps nothing they read, which the compiler has to be told.
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

// `work` holds one row.
template <class T>
TTCFAST_INLINE void forward_row(const Layer<T>& layer, const T* x, const T* rows, T* __restrict work, T* y, T* stats) {
    const int64_t width = layer.width;
    add(layer, x, rows, work);
    const T mean = sum(work, width) / static_cast<T>(width);
    for (int64_t i = 0; i < width; ++i) work[i] -= mean;
    const T rstd = 1 / std::sqrt(dot(work, work, width) / static_cast<T>(width) + layer.eps);
    for (int64_t i = 0; i < width; ++i) work[i] *= rstd;
    write_mish(work, layer.scale, layer.shift, width, y);
    stats[0] = mean;
    stats[1] = rstd;
}

// What one row adds to the gradients of scale and shift goes into `parameters` [2, width] where that is not null; `work` holds two rows.
template <class T>
TTCFAST_INLINE void backward_row(const Layer<T>& layer, const T* x, const T* rows, const T* grad, const T* stats, T* __restrict work,
                                 T* __restrict grad_x, T* y, T* __restrict parameters) {
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

// The clones: one function per type and direction, over a block of rows.
template <class T>
struct Block {
    Layer<T> layer;
    int64_t count;
    const T *x, *rows, *grad;
    T *work, *y, *stats, *grad_x, *parameters;
};

template <class T>
TTCFAST_INLINE void forward_block(const Block<T>& b) {
    const int64_t width = b.layer.width;
    for (int64_t r = 0; r < b.count; ++r) {
        forward_row(b.layer, b.x + r * width, b.rows ? b.rows + r * width : nullptr, b.work, b.y + r * width, b.stats + 2 * r);
    }
}

template <class T>
TTCFAST_INLINE void backward_block(const Block<T>& b) {
    const int64_t width = b.layer.width;
    for (int64_t r = 0; r < b.count; ++r) {
        const int64_t at = r * width;
        backward_row(b.layer, b.x + at, b.rows ? b.rows + at : nullptr, b.grad + at, b.stats + 2 * r, b.work, b.grad_x + at,
                     b.y ? b.y + at : nullptr, b.parameters);
    }
}

TTCFAST_CLONES void forward_float(const Block<float>& b) { forward_block(b); }
TTCFAST_CLONES void forward_double(const Block<double>& b) { forward_block(b); }
TTCFAST_CLONES void backward_float(const Block<float>& b) { backward_block(b); }
TTCFAST_CLONES void backward_double(const Block<double>& b) { backward_block(b); }

inline void forward(const Block<float>& b) { forward_float(b); }
inline void forward(const Block<double>& b) { forward_double(b); }
inline void backward(const Block<float>& b) { backward_float(b); }
inline void backward(const Block<double>& b) { backward_double(b); }

// Calls work(block, number) for blocks of rows, each with room of its worker's for `rows_of_work` rows.
template <class T, class Work>
void for_blocks(const NormMish& p, int64_t rows_of_work, const Work& work) {
    const int64_t blocks = (p.count + kBlock - 1) / kBlock;
    const int threads = p.count * p.width < kSerialBelow ? 1 : static_cast<int>(std::clamp<int64_t>(blocks, 1, std::max(p.threads, 1)));
    std::vector<T> room(static_cast<size_t>(threads * rows_of_work * p.width));
    const Layer<T> layer{p.width, static_cast<const T*>(p.bias), static_cast<const T*>(p.scale), static_cast<const T*>(p.shift),
                         static_cast<T>(p.eps)};
    parallel_for(blocks, threads, [&](int64_t number, int worker) {
        const int64_t first = number * kBlock, at = first * p.width;
        Block<T> block{};
        block.layer = layer;
        block.count = std::min(kBlock, p.count - first);
        block.x = static_cast<const T*>(p.x) + at;
        block.rows = p.rows ? static_cast<const T*>(p.rows) + at : nullptr;
        block.work = room.data() + worker * rows_of_work * p.width;
        work(block, number);
    });
}

template <class T>
void forward_typed(const NormMish& p, T* y, T* stats) {
    for_blocks<T>(p, 1, [&](Block<T>& block, int64_t number) {
        block.y = y + number * kBlock * p.width;
        block.stats = stats + number * kBlock * 2;
        forward(block);
    });
}

template <class T>
void backward_typed(const NormMish& p, const T* grad, const T* stats, T* grad_x, T* y, T* grad_scale, T* grad_shift) {
    const int64_t blocks = (p.count + kBlock - 1) / kBlock;
    std::vector<T> parameters(grad_scale ? static_cast<size_t>(blocks * 2 * p.width) : 0);
    for_blocks<T>(p, 2, [&](Block<T>& block, int64_t number) {
        const int64_t at = number * kBlock * p.width;
        block.grad = grad + at;
        block.stats = const_cast<T*>(stats) + number * kBlock * 2;
        block.grad_x = grad_x + at;
        block.y = y ? y + at : nullptr;
        block.parameters = grad_scale ? parameters.data() + number * 2 * p.width : nullptr;
        backward(block);
    });
    if (!grad_scale) return;
    std::fill(grad_scale, grad_scale + p.width, T(0));
    std::fill(grad_shift, grad_shift + p.width, T(0));
    for (int64_t number = 0; number < blocks; ++number) {
        const T* part = parameters.data() + number * 2 * p.width;
        for (int64_t i = 0; i < p.width; ++i) grad_scale[i] += part[i];
        for (int64_t i = 0; i < p.width; ++i) grad_shift[i] += part[p.width + i];
    }
}

}  // namespace

void norm_mish_cpu(const NormMish& p, void* y, void* stats) {
    p.wide ? forward_typed(p, static_cast<double*>(y), static_cast<double*>(stats))
           : forward_typed(p, static_cast<float*>(y), static_cast<float*>(stats));
}

void norm_mish_backward_cpu(const NormMish& p, const void* grad, const void* stats, void* grad_x, void* y, void* grad_scale,
                            void* grad_shift) {
    auto run = [&](auto zero) {
        using T = decltype(zero);
        backward_typed(p, static_cast<const T*>(grad), static_cast<const T*>(stats), static_cast<T*>(grad_x), static_cast<T*>(y),
                       static_cast<T*>(grad_scale), static_cast<T*>(grad_shift));
    };
    p.wide ? run(0.0) : run(0.0f);
}

}  // namespace ttcfast
