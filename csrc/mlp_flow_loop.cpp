// The rows of mlp_flow, compiled once per instruction set (level.h).
#include <cstring>

#include "heun.h"
#include "mlp_flow.h"
#include "multiply.h"
#include "norm_mish.h"

namespace ttcfast {
namespace {

// Buffers of one block.
template <class T>
struct Room {
    T *product, *active, *norm, *stats, *slopes[2], *state, *zeros;
};

template <class T>
TTCFAST_INLINE int64_t widest(const FlowBlock<T>& b) {
    int64_t most = 1;
    for (int64_t i = 0; i < b.hidden + 2; ++i) most = b.widths[i] > most ? b.widths[i] : most;
    return most;
}

template <class T>
TTCFAST_INLINE Room<T> room(const FlowBlock<T>& b) {
    const int64_t wide = widest(b), block = b.count * wide;
    Room<T> r{b.work, b.work + block, b.work + 2 * block, b.work + 2 * block + 2 * wide, {}, nullptr, nullptr};
    r.slopes[0] = r.stats + 2 * b.count;
    r.slopes[1] = r.slopes[0] + block;
    r.state = r.slopes[1] + block;
    r.zeros = r.state + block;
    for (int64_t i = 0; i < wide; ++i) r.zeros[i] = 0;
    return r;
}

// Where the block's rows begin in a tensor [E, S, B, width] or [T, S, B, width], or null.
template <class T, class P>
TTCFAST_INLINE P* rows_of(const FlowBlock<T>& b, P* tensor, int64_t place, int64_t width) {
    return tensor ? tensor + ((place * b.sets + b.set) * b.batch + b.first) * width : nullptr;
}

template <class T>
TTCFAST_INLINE NormMishLayer<T> layer_of(const FlowBlock<T>& b, int64_t layer, int64_t time) {
    const int64_t width = b.widths[layer + 1];
    return {width, layer ? b.biases[layer - 1] : b.times + time * width, b.scales[layer], b.shifts[layer], b.eps};
}

template <class T>
void velocity(const FlowBlock<T>& b, const Room<T>& r, const T* z, int64_t step, int64_t evaluation, int64_t time, T* out) {
    const T* x = z;
    int64_t inner = b.widths[0];
    if (b.inputs) std::memcpy(rows_of(b, b.inputs, evaluation, inner), z, static_cast<size_t>(b.count * inner) * sizeof(T));
    for (int64_t layer = 0; layer < b.hidden; ++layer) {
        const int64_t width = b.widths[layer + 1];
        T* product = b.products ? rows_of(b, b.products[layer], evaluation, width) : r.product;
        multiply<T>(b.count, width, inner, {x, inner, 1}, b.transposed[layer], width, r.zeros, 0, product, width);
        NormMishBlock<T> norm{};
        norm.layer = layer_of(b, layer, time);
        norm.count = b.count;
        norm.x = product;
        norm.rows = layer ? nullptr : rows_of(b, b.rows, step, width);
        norm.work = r.norm;
        norm.y = r.active;
        norm.stats = b.stats ? rows_of(b, b.stats[layer], evaluation, int64_t(2)) : r.stats;
        norm_mish_rows<T, kLevel>(norm);
        x = r.active;
        inner = width;
    }
    const int64_t outputs = b.widths[b.hidden + 1];
    multiply<T>(b.count, outputs, inner, {x, inner, 1}, b.transposed[b.hidden], outputs, b.biases[b.hidden - 1], 0, out, outputs);
}

// Adds the columns' sums of x [count, width] to `sums`.
template <class T>
TTCFAST_INLINE void add_columns(const T* x, int64_t count, int64_t width, T* __restrict sums) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < width; ++j) sums[j] += x[i * width + j];
    }
}

// Writes the gradient of an evaluation's input, from that of its slope, to `out`. `opens`: whether it is a step's first to come by.
template <class T>
void velocity_backward(const FlowBlock<T>& b, const Room<T>& r, const T* slope, int64_t step, int64_t evaluation, int64_t time, bool opens,
                       T* out) {
    const int64_t outputs = b.widths[b.hidden + 1], times = b.substeps + (b.method == Method::heun);
    const bool trained = b.inputs != nullptr;
    T* sums = b.sums;
    if (trained) {
        for (int64_t layer = 0; layer < b.hidden; ++layer) sums += b.widths[layer + 1] * (2 + (layer ? 1 : times));
        add_columns(slope, b.count, outputs, sums);
        T* kept = rows_of(b, b.of_slopes, evaluation, outputs);
        if (kept != slope) std::memcpy(kept, slope, static_cast<size_t>(b.count * outputs) * sizeof(T));
    }
    const T* grad = slope;
    for (int64_t layer = b.hidden - 1; layer >= 0; --layer) {
        const int64_t width = b.widths[layer + 1], next = b.widths[layer + 2];
        multiply<T>(b.count, width, next, {grad, next, 1}, b.weights[layer + 1], width, r.zeros, 0, r.active, width);
        NormMishBlock<T> norm{};
        norm.layer = layer_of(b, layer, time);
        norm.count = b.count;
        norm.x = rows_of(b, b.products[layer], evaluation, width);
        norm.rows = layer ? nullptr : rows_of(b, b.rows, step, width);
        norm.grad = r.active;
        norm.work = r.norm;
        norm.stats = rows_of(b, b.stats[layer], evaluation, int64_t(2));
        norm.grad_x = trained ? rows_of(b, b.of_products[layer], evaluation, width) : r.product;
        if (trained) {
            sums -= width * (2 + (layer ? 1 : times));
            norm.y = rows_of(b, b.active[layer], evaluation, width);
            norm.parameters = sums;
        }
        norm_mish_rows_backward<T, kLevel>(norm);
        if (trained) add_columns(norm.grad_x, b.count, width, sums + width * (2 + (layer ? 0 : time)));
        grad = norm.grad_x;
    }
    const int64_t width = b.widths[1], inputs = b.widths[0];
    if (T* of_rows = rows_of(b, b.grad_rows, step, width)) {
        for (int64_t i = 0; i < b.count * width; ++i) of_rows[i] = opens ? grad[i] : of_rows[i] + grad[i];
    }
    multiply<T>(b.count, inputs, width, {grad, width, 1}, b.weights[0], inputs, r.zeros, 0, out, inputs);
}

template <class T>
TTCFAST_INLINE void update(const FlowBlock<T>& b, const T* base, const T* first, const T* second, T step, T ratio, T* out) {
    heun_run<T, kLevel>(HeunRun<T>{base, first, second, step, ratio, out}, b.count * b.widths[0], b.group);
}

template <class T>
TTCFAST_INLINE void add(const T* x, int64_t n, T* total) {
    for (int64_t i = 0; i < n; ++i) total[i] += x[i];
}

template <class T>
TTCFAST_INLINE int64_t evaluations(const FlowBlock<T>& b) {
    return b.substeps * (b.method == Method::heun ? 2 : 1);
}

// Writes the state after a step to `result`.
template <class T>
void advance(const FlowBlock<T>& b, const Room<T>& r, const T* z, int64_t step, T* result) {
    const T dt = T(1) / static_cast<T>(b.substeps);
    int64_t evaluation = step * evaluations(b);
    if (b.method == Method::map) return velocity(b, r, z, step, evaluation, 0, result);
    for (int64_t k = 0; k < b.substeps; ++k) {
        velocity(b, r, z, step, evaluation++, k, r.slopes[0]);
        if (b.method == Method::euler) {
            update<T>(b, z, r.slopes[0], nullptr, dt, 1, result);
        } else {
            update<T>(b, z, r.slopes[0], nullptr, dt, 1, r.state);
            velocity(b, r, r.state, step, evaluation++, k + 1, r.slopes[1]);
            update<T>(b, z, r.slopes[0], r.slopes[1], dt / 2, 1, result);
        }
        z = result;
    }
}

// Replaces `total`, the gradient of a step's end, by that of its start. Uses r.slopes.
template <class T>
void retreat(const FlowBlock<T>& b, const Room<T>& r, int64_t step, T* total) {
    const T dt = T(1) / static_cast<T>(b.substeps), *none = nullptr;
    const int64_t n = b.count * b.widths[0];
    T *of_start = r.slopes[1], *slope = r.slopes[0];
    int64_t evaluation = (step + 1) * evaluations(b);
    if (b.method == Method::map) {
        velocity_backward(b, r, total, step, --evaluation, 0, true, of_start);
        std::memcpy(total, of_start, static_cast<size_t>(n) * sizeof(T));
        return;
    }
    for (int64_t k = b.substeps - 1; k >= 0; --k) {
        const bool opens = k == b.substeps - 1;
        if (b.method == Method::euler) {
            update<T>(b, none, total, none, dt, 1, slope);
            velocity_backward(b, r, slope, step, --evaluation, k, opens, of_start);
        } else {
            update<T>(b, none, total, none, dt / 2, 1, slope);
            velocity_backward(b, r, slope, step, --evaluation, k + 1, opens, of_start);
            update<T>(b, none, total, of_start, dt / 2, 2, slope);
            add(of_start, n, total);
            velocity_backward(b, r, slope, step, --evaluation, k, false, of_start);
        }
        add(of_start, n, total);
    }
}

// Where the block's rows begin in z [S, B, D].
template <class T, class P>
TTCFAST_INLINE P* rows_of_start(const FlowBlock<T>& b, P* tensor) {
    return tensor + (b.set * b.batch + b.first) * b.widths[0];
}

}  // namespace

template <class T, Level level>
void mlp_flow_rows(const FlowBlock<T>& b) {
    const Room<T> r = room(b);
    const T* z = rows_of_start(b, b.z);
    for (int64_t step = 0; step < b.steps; ++step) {
        T* result = rows_of(b, b.result, step, b.widths[b.hidden + 1]);
        advance(b, r, z, step, result);
        z = result;
    }
}

template <class T, Level level>
void mlp_flow_rows_backward(const FlowBlock<T>& b) {
    const Room<T> r = room(b);
    const int64_t outputs = b.widths[b.hidden + 1];
    std::memcpy(r.state, rows_of(b, b.grad, b.steps - 1, outputs), static_cast<size_t>(b.count * outputs) * sizeof(T));
    for (int64_t step = b.steps - 1; step >= 0; --step) {
        if (step < b.steps - 1) add(rows_of(b, b.grad, step, outputs), b.count * outputs, r.state);
        retreat(b, r, step, r.state);
    }
    std::memcpy(rows_of_start(b, b.grad_z), r.state, static_cast<size_t>(b.count * b.widths[0]) * sizeof(T));
}

// Rows of the policy's actions and of `rows`, what they add to the first product of the dynamics.
template <class T, Level level>
void closed_loop_rows(const FlowBlock<T>& policy, const FlowBlock<T>& dynamics, const LoopBlock<T>& loop) {
    const Room<T> of_policy = room(policy), of_dynamics = room(dynamics);
    const int64_t latent = dynamics.widths[0], actions = policy.widths[policy.hidden + 1], width = dynamics.widths[1];
    const T* z = rows_of_start(dynamics, dynamics.z);
    for (int64_t step = 0; step < dynamics.steps; ++step) {
        T* action = rows_of(policy, policy.result, step, actions);
        velocity(policy, of_policy, z, step, step, 0, action);
        const T* offset = rows_of(policy, loop.offsets, step, actions);
        for (int64_t i = 0; i < policy.count * actions; ++i) action[i] = tanh(action[i] + offset[i]);
        multiply<T>(policy.count, width, actions, {action, actions, 1}, loop.transposed, width, of_dynamics.zeros, 0,
                    rows_of(dynamics, loop.rows, step, width), width);
        T* result = rows_of(dynamics, dynamics.result, step, latent);
        advance(dynamics, of_dynamics, z, step, result);
        z = result;
    }
}

template <class T, Level level>
void closed_loop_rows_backward(const FlowBlock<T>& policy, const FlowBlock<T>& dynamics, const LoopBlock<T>& loop) {
    const Room<T> of_policy = room(policy), of_dynamics = room(dynamics);
    const int64_t latent = dynamics.widths[0], actions = policy.widths[policy.hidden + 1], width = dynamics.widths[1];
    const int64_t n = dynamics.count * latent;
    T* total = of_dynamics.state;
    for (int64_t i = 0; i < n; ++i) total[i] = 0;
    for (int64_t step = dynamics.steps - 1; step >= 0; --step) {
        add(rows_of(dynamics, dynamics.grad, step, latent), n, total);
        retreat(dynamics, of_dynamics, step, total);
        T* inner = rows_of(policy, loop.grad_offsets, step, actions);
        multiply<T>(policy.count, actions, width, {rows_of(dynamics, dynamics.grad_rows, step, width), width, 1}, loop.weight, actions,
                    rows_of(policy, policy.grad, step, actions), actions, inner, actions);
        const T* action = rows_of(policy, loop.actions, step, actions);
        for (int64_t i = 0; i < policy.count * actions; ++i) inner[i] *= 1 - action[i] * action[i];
        velocity_backward(policy, of_policy, inner, step, step, 0, true, of_policy.slopes[1]);
        if (!loop.detach) add(of_policy.slopes[1], n, total);
    }
    std::memcpy(rows_of_start(dynamics, dynamics.grad_z), total, static_cast<size_t>(n) * sizeof(T));
}

template <class T, Level level>
void multiply_transposed(int64_t m, int64_t n, int64_t k, int64_t parts, int64_t skip, const T* a, const T* b, T* c) {
    for (int64_t i = 0; i < m * n; ++i) c[i] = 0;
    for (int64_t part = 0; part < parts; ++part) {
        multiply<T>(m, n, k, {a + part * skip * m, 1, m}, b + part * skip * n, n, c, n, c, n);
    }
}

template void mlp_flow_rows<float, kLevel>(const FlowBlock<float>&);
template void mlp_flow_rows<double, kLevel>(const FlowBlock<double>&);
template void mlp_flow_rows_backward<float, kLevel>(const FlowBlock<float>&);
template void mlp_flow_rows_backward<double, kLevel>(const FlowBlock<double>&);
template void multiply_transposed<float, kLevel>(int64_t, int64_t, int64_t, int64_t, int64_t, const float*, const float*, float*);
template void multiply_transposed<double, kLevel>(int64_t, int64_t, int64_t, int64_t, int64_t, const double*, const double*, double*);

template void closed_loop_rows<float, kLevel>(const FlowBlock<float>&, const FlowBlock<float>&, const LoopBlock<float>&);
template void closed_loop_rows<double, kLevel>(const FlowBlock<double>&, const FlowBlock<double>&, const LoopBlock<double>&);
template void closed_loop_rows_backward<float, kLevel>(const FlowBlock<float>&, const FlowBlock<float>&, const LoopBlock<float>&);
template void closed_loop_rows_backward<double, kLevel>(const FlowBlock<double>&, const FlowBlock<double>&, const LoopBlock<double>&);

}  // namespace ttcfast
