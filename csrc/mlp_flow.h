// Steps of a velocity MLP, and their gradients: every product, LayerNorm and update of a block of rows in one call. For networks so small
// that calls from Python would cost more than their arithmetic. The definition is mlp_flow_ref in ttcfast/ops/mlp_flow.py.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "dtype.h"
#include "level.h"

namespace ttcfast {

enum class Method : int { heun = 0, euler = 1, map = 2 };  // in the order of METHODS in ttcfast/ops/mlp_flow.py

// S sets of parameters, B rows, T steps of J evaluations each, E = T J in all. All tensors are contiguous but for the weights, and the sets
// of the other parameters may lie apart.
struct MlpFlow {
    DType dtype;
    int64_t sets, batch, steps, substeps, group;
    Method method;
    double eps;
    std::vector<int64_t> widths;                  // D, U1, ..., Un, O
    const void *z, *rows, *times;                 // [S, B, D]; [T, S, B, U1] or null; [S, times of a step, U1]
    std::vector<const void*> weights;             // [S, O, I] of each product
    std::vector<std::array<int64_t, 3>> strides;  // of the weights
    std::vector<const void*> biases;              // [S, O] of each product but the first
    std::vector<const void*> scales, shifts;      // [S, U]
    std::vector<int64_t> skips;                   // between sets of times, biases, scales and shifts, in this order
    std::vector<void*> products, stats;           // [E, S, B, U] and [E, S, B, 2] of each hidden layer; no entries: not kept
    void* inputs;                                 // [E, S, B, D], or null: weights are not trained
    int threads;
    Level level;
};

// Gradients. All but those of z and rows are wanted if `inputs` were kept; `weights` are contiguous.
struct MlpFlowGradients {
    const void* result;  // [T, S, B, O]
    void *z, *rows, *times;
    std::vector<void*> weights, biases, scales, shifts;
};

// result [T, S, B, O]: the state after each step.
void mlp_flow_cpu(const MlpFlow& p, void* result);
void mlp_flow_backward_cpu(const MlpFlow& p, const MlpFlowGradients& grads);

// A policy's actions inside the dynamics: at every step a = tanh(policy(z) + offset), whose product with `weight` is what `rows` are in
// `dynamics`. The policy is a map of as many steps as the dynamics; its z and rows are null, and its result is the actions.
struct ClosedLoop {
    MlpFlow policy, dynamics;
    const void* offsets;             // [T, S, B, A]
    const void* weight;              // [S, U1, A]
    std::array<int64_t, 3> strides;  // of weight
    void* rows;                      // [T, S, B, U1]
    bool detach;                     // whether gradients reach states through the dynamics alone, not through what the policy sees
};

// states [T, S, B, D], actions [T, S, B, A]. Of the gradients of `dynamics` that of z alone is written; those of the policy have no z.
void closed_loop_cpu(const ClosedLoop& p, void* states, void* actions);
void closed_loop_backward_cpu(const ClosedLoop& p, const void* actions, const MlpFlowGradients& dynamics, const MlpFlowGradients& policy,
                              void* offsets);

// A block of rows of one set, in each direction compiled once per level.
template <class T>
struct FlowBlock {
    int64_t sets, batch, steps, substeps, group, hidden;
    Method method;
    T eps;
    const int64_t* widths;
    int64_t set, first, count;                    // the block's rows
    const T *z, *rows;                            // of all sets
    const T* times;                               // of this set, like the next five
    const T *const *weights, *const *transposed;  // [O, I] and [I, O], contiguous
    const T *const *biases, *const *scales, *const *shifts;
    T *const *products, *const *stats;
    T *inputs, *result;
    // Backward.
    const T* grad;
    T *grad_z, *grad_rows;
    T* const* of_products;  // gradients of products and slopes, [E, S, B, U], and hidden layers' results; null if weights are not trained
    T* of_slopes;
    T* const* active;
    T* sums;  // of the block: for each hidden layer gradients of scale, shift and of each of its biases; then that of the last bias
    T* work;  // room for 5 blocks of the widest layer, 3 rows of it and 2 numbers per row
};

template <class T, Level level>
void mlp_flow_rows(const FlowBlock<T>& b);
template <class T, Level level>
void mlp_flow_rows_backward(const FlowBlock<T>& b);

template <class T>
struct LoopBlock {
    const T *offsets, *actions;    // of all sets
    const T *weight, *transposed;  // [U1, A] and [A, U1] of this set
    T *rows, *grad_offsets;        // of all sets
    bool detach;
};

template <class T, Level level>
void closed_loop_rows(const FlowBlock<T>& policy, const FlowBlock<T>& dynamics, const LoopBlock<T>& loop);
template <class T, Level level>
void closed_loop_rows_backward(const FlowBlock<T>& policy, const FlowBlock<T>& dynamics, const LoopBlock<T>& loop);

// c [m, n] = a^T b over `parts` pairs of [k, m] and [k, n], each `skip` rows after the one before.
template <class T, Level level>
void multiply_transposed(int64_t m, int64_t n, int64_t k, int64_t parts, int64_t skip, const T* a, const T* b, T* c);

}  // namespace ttcfast
