#include <algorithm>
#include <type_traits>

#include "memory.h"
#include "mlp_flow.h"
#include "parallel.h"

namespace ttcfast {
namespace {

constexpr int64_t kBlock = 64;             // rows per work item; sums over rows are per block, so results do not depend on threads
constexpr int64_t kSerialBelow = 1 << 19;  // multiplications below which starting a thread costs more than it saves

template <class T>
std::vector<const T*> typed(const std::vector<const void*>& tensors, int64_t set, const int64_t* skips) {
    std::vector<const T*> found(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) found[i] = static_cast<const T*>(tensors[i]) + set * skips[i];
    return found;
}
template <class T>
std::vector<T*> typed(const std::vector<void*>& tensors) {
    std::vector<T*> found(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) found[i] = static_cast<T*>(tensors[i]);
    return found;
}

inline bool contiguous(int64_t row, int64_t column, int64_t columns) { return column == 1 && row == columns; }

// to [rows, columns] = from, by squares that stay in the first cache.
template <class T>
void copy_strided(const T* from, int64_t rows, int64_t columns, int64_t row, int64_t column, T* to) {
    constexpr int64_t side = 16;
    for (int64_t i0 = 0; i0 < rows; i0 += side) {
        const int64_t i1 = std::min(rows, i0 + side);
        for (int64_t j0 = 0; j0 < columns; j0 += side) {
            const int64_t j1 = std::min(columns, j0 + side);
            for (int64_t i = i0; i < i1; ++i) {
                for (int64_t j = j0; j < j1; ++j) to[i * columns + j] = from[i * row + j * column];
            }
        }
    }
}

// One set of parameters: where each tensor begins, and contiguous copies of the weights in the layouts of both directions.
template <class T>
struct Network {
    const T* times;
    std::vector<const T*> weights, transposed, biases, scales, shifts;
    Memory<T> copies;
};

template <class T>
Network<T> network(const MlpFlow& p, int64_t set, bool backward) {
    const size_t products = p.weights.size(), hidden = products - 1;
    int64_t room = 0;
    for (size_t i = 0; i < products; ++i) room += p.widths[i] * p.widths[i + 1];
    Network<T> net{nullptr, {}, {}, {}, {}, {}, Memory<T>(room)};
    net.times = static_cast<const T*>(p.times) + set * p.skips[0];
    T* copy = net.copies.get();
    net.biases = typed<T>(p.biases, set, p.skips.data() + 1);
    net.scales = typed<T>(p.scales, set, p.skips.data() + 1 + hidden);
    net.shifts = typed<T>(p.shifts, set, p.skips.data() + 1 + 2 * hidden);
    for (size_t i = 0; i < products; ++i) {
        const int64_t inputs = p.widths[i], outputs = p.widths[i + 1];
        const T* from = static_cast<const T*>(p.weights[i]) + set * p.strides[i][0];
        const int64_t step_o = p.strides[i][1], step_i = p.strides[i][2];
        if (backward ? contiguous(step_o, step_i, inputs) : contiguous(step_i, step_o, outputs)) {
            (backward ? net.weights : net.transposed).push_back(from);
            continue;
        }
        if (backward) {
            copy_strided(from, outputs, inputs, step_o, step_i, copy);
            net.weights.push_back(copy);
        } else {
            copy_strided(from, inputs, outputs, step_i, step_o, copy);
            net.transposed.push_back(copy);
        }
        copy += inputs * outputs;
    }
    return net;
}

template <class T>
struct Problem {
    const MlpFlow& p;
    int64_t hidden, times, evaluations, widest, blocks;
    std::vector<T*> products, stats;
    int threads;

    explicit Problem(const MlpFlow& problem) : p(problem) {
        hidden = static_cast<int64_t>(p.weights.size()) - 1;
        times = p.substeps + (p.method == Method::heun);
        evaluations = p.steps * p.substeps * (p.method == Method::heun ? 2 : 1);
        widest = *std::max_element(p.widths.begin(), p.widths.end());
        blocks = (p.batch + kBlock - 1) / kBlock;
        products = typed<T>(p.products);
        stats = typed<T>(p.stats);
        threads = multiplications() < kSerialBelow ? 1 : std::max(p.threads, 1);
    }

    int64_t multiplications() const {
        int64_t each = 0;
        for (int64_t i = 0; i <= hidden; ++i) each += p.widths[i] * p.widths[i + 1];
        return each * evaluations * p.batch * p.sets;
    }

    FlowBlock<T> block(const Network<T>& net, int64_t set, int64_t number, T* work) const {
        FlowBlock<T> b{};
        b.sets = p.sets, b.batch = p.batch, b.steps = p.steps, b.substeps = p.substeps, b.group = p.group, b.hidden = hidden;
        b.method = p.method, b.eps = static_cast<T>(p.eps), b.widths = p.widths.data();
        b.set = set, b.first = number * kBlock, b.count = std::min(kBlock, p.batch - b.first);
        b.z = static_cast<const T*>(p.z), b.rows = static_cast<const T*>(p.rows), b.times = net.times;
        b.weights = net.weights.data(), b.transposed = net.transposed.data();
        b.biases = net.biases.data(), b.scales = net.scales.data(), b.shifts = net.shifts.data();
        b.products = products.empty() ? nullptr : products.data();
        b.stats = stats.empty() ? nullptr : stats.data();
        b.inputs = static_cast<T*>(p.inputs);
        b.work = work;
        return b;
    }

    // Numbers of a block's work.
    int64_t room() const { return 5 * kBlock * widest + 3 * widest + 2 * kBlock; }

    // Calls work(set, number of the block in it, its place among all, buffer of `room` numbers) for every block of every set.
    template <class Work>
    void for_blocks(int64_t room, const Work& work) const {
        const int workers = static_cast<int>(std::clamp<int64_t>(p.sets * blocks, 1, threads));
        const Memory<T> buffer(workers * room);
        parallel_for(p.sets * blocks, workers,
                     [&](int64_t item, int worker) { work(item / blocks, item % blocks, item, buffer.get() + worker * room); });
    }

    std::vector<Network<T>> networks(bool backward) const {
        std::vector<Network<T>> nets;
        for (int64_t set = 0; set < p.sets; ++set) nets.push_back(network<T>(p, set, backward));
        return nets;
    }
};

template <class T>
void forward_typed(const MlpFlow& p, T* result) {
    const Problem<T> problem(p);
    const auto run = at_level(p.level, [](auto level) { return &mlp_flow_rows<T, level>; });
    const auto nets = problem.networks(false);
    problem.for_blocks(problem.room(), [&](int64_t set, int64_t number, int64_t, T* work) {
        FlowBlock<T> block = problem.block(nets[static_cast<size_t>(set)], set, number, work);
        block.result = result;
        run(block);
    });
}

// Gradients of the weights: one product per layer over all evaluations.
template <class T>
void weights_typed(const Problem<T>& problem, const MlpFlowGradients& grads, const std::vector<T*>& of_outputs,
                   const std::vector<T*>& inputs) {
    const MlpFlow& p = problem.p;
    const auto run = at_level(p.level, [](auto level) { return &multiply_transposed<T, level>; });
    const bool merged = p.sets == 1;  // then the rows of all evaluations follow one another
    const int64_t count = merged ? p.batch * problem.evaluations : p.batch, parts = merged ? 1 : problem.evaluations;
    const int64_t layers = problem.hidden + 1;
    parallel_for(p.sets * layers, problem.threads, [&](int64_t item, int) {
        const int64_t set = item / layers;
        const size_t i = static_cast<size_t>(item % layers);
        const int64_t rows = p.widths[i + 1], columns = p.widths[i];
        run(rows, columns, count, parts, p.sets * p.batch, of_outputs[i] + set * p.batch * rows, inputs[i] + set * p.batch * columns,
            static_cast<T*>(grads.weights[i]) + set * rows * columns);
    });
}

// Adds up the blocks' sums in their order and hands them out; their layout is that of FlowBlock::sums.
template <class T>
void sums_typed(const Problem<T>& problem, const MlpFlowGradients& grads, T* sums, int64_t length) {
    const MlpFlow& p = problem.p;
    for (int64_t set = 0; set < p.sets; ++set) {
        T* total = sums + set * problem.blocks * length;
        for (int64_t number = 1; number < problem.blocks; ++number) {
            for (int64_t i = 0; i < length; ++i) total[i] += total[number * length + i];
        }
        auto take = [&](void* to, int64_t count) {
            if (problem.blocks) {
                std::copy_n(total, count, static_cast<T*>(to) + set * count);
            } else {
                std::fill_n(static_cast<T*>(to) + set * count, count, T(0));
            }
            total += count;
        };
        for (int64_t layer = 0; layer < problem.hidden; ++layer) {
            const size_t i = static_cast<size_t>(layer);
            const int64_t width = p.widths[i + 1];
            take(grads.scales[i], width);
            take(grads.shifts[i], width);
            take(layer ? grads.biases[i - 1] : grads.times, layer ? width : width * problem.times);
        }
        take(grads.biases.back(), p.widths.back());
    }
}

// What the backward pass of a network collects: the gradients of products and slopes, hidden layers' results, and sums over rows.
template <class T>
struct Collected {
    const Problem<T>& problem;
    bool trained;
    int64_t length;  // of a block's sums
    Memory<T> buffer;
    std::vector<T*> of_outputs, inputs, active;
    std::vector<T> sums;

    explicit Collected(const Problem<T>& given) : problem(given) {
        const MlpFlow& p = problem.p;
        trained = p.inputs != nullptr;
        const int64_t rows = trained ? problem.evaluations * p.sets * p.batch : 0;
        int64_t numbers = 0;
        for (int64_t i = 0; i <= problem.hidden; ++i) numbers += rows * p.widths[static_cast<size_t>(i) + 1] * (i < problem.hidden ? 2 : 1);
        buffer = Memory<T>(numbers);
        T* at = buffer.get();
        inputs.push_back(static_cast<T*>(p.inputs));
        length = p.widths.back();
        for (int64_t i = 0; i < problem.hidden; ++i) {
            const int64_t width = p.widths[static_cast<size_t>(i) + 1];
            of_outputs.push_back(at);
            inputs.push_back(at + rows * width);
            active.push_back(at + rows * width);
            at += 2 * rows * width;
            length += width * (2 + (i ? 1 : problem.times));
        }
        of_outputs.push_back(at);
        sums.resize(trained ? static_cast<size_t>(p.sets * problem.blocks * length) : 0);
    }

    void lend(FlowBlock<T>& block, const MlpFlowGradients& grads, int64_t item) {
        block.grad = static_cast<const T*>(grads.result);
        block.grad_z = static_cast<T*>(grads.z);
        block.grad_rows = static_cast<T*>(grads.rows);
        block.of_products = of_outputs.data();
        block.of_slopes = of_outputs.back();
        block.active = active.data();
        block.sums = sums.data() + (trained ? item * length : 0);
    }

    void finish(const MlpFlowGradients& grads) {
        if (!trained) return;
        weights_typed(problem, grads, of_outputs, inputs);
        sums_typed(problem, grads, sums.data(), length);
    }
};

template <class T>
void backward_typed(const MlpFlow& p, const MlpFlowGradients& grads) {
    const Problem<T> problem(p);
    Collected<T> collected(problem);
    const auto run = at_level(p.level, [](auto level) { return &mlp_flow_rows_backward<T, level>; });
    const auto nets = problem.networks(true);
    problem.for_blocks(problem.room(), [&](int64_t set, int64_t number, int64_t item, T* work) {
        FlowBlock<T> block = problem.block(nets[static_cast<size_t>(set)], set, number, work);
        collected.lend(block, grads, item);
        run(block);
    });
    collected.finish(grads);
}

// Contiguous copies of the weight of the actions, of all sets: [S, U1, A], or transposed.
template <class T>
Memory<T> action_weights(const ClosedLoop& p, bool transposed) {
    const int64_t width = p.dynamics.widths[1], actions = p.policy.widths.back();
    Memory<T> copies(p.dynamics.sets * width * actions);
    for (int64_t set = 0; set < p.dynamics.sets; ++set) {
        const T* from = static_cast<const T*>(p.weight) + set * p.strides[0];
        T* to = copies.get() + set * width * actions;
        if (transposed) {
            copy_strided(from, actions, width, p.strides[2], p.strides[1], to);
        } else {
            copy_strided(from, width, actions, p.strides[1], p.strides[2], to);
        }
    }
    return copies;
}

template <class T>
LoopBlock<T> loop_block(const ClosedLoop& p, int64_t set, const T* weights) {
    const T* weight = weights + set * p.dynamics.widths[1] * p.policy.widths.back();
    return {static_cast<const T*>(p.offsets), nullptr, weight, weight, static_cast<T*>(p.rows), nullptr, p.detach};
}

template <class T>
void loop_typed(const ClosedLoop& p, T* states, T* actions) {
    const Problem<T> policy(p.policy), dynamics(p.dynamics);
    const auto run = at_level(p.dynamics.level, [](auto level) { return &closed_loop_rows<T, level>; });
    const auto policies = policy.networks(false), nets = dynamics.networks(false);
    const auto weights = action_weights<T>(p, true);
    dynamics.for_blocks(policy.room() + dynamics.room(), [&](int64_t set, int64_t number, int64_t, T* work) {
        FlowBlock<T> acts = policy.block(policies[static_cast<size_t>(set)], set, number, work);
        FlowBlock<T> moves = dynamics.block(nets[static_cast<size_t>(set)], set, number, work + policy.room());
        acts.result = actions;
        moves.result = states;
        moves.rows = static_cast<const T*>(p.rows);
        run(acts, moves, loop_block(p, set, weights.get()));
    });
}

template <class T>
void loop_backward_typed(const ClosedLoop& p, const T* actions, const MlpFlowGradients& of_dynamics, const MlpFlowGradients& of_policy,
                         T* of_offsets) {
    const Problem<T> policy(p.policy), dynamics(p.dynamics);
    Collected<T> of_acts(policy), of_moves(dynamics);
    const auto run = at_level(p.dynamics.level, [](auto level) { return &closed_loop_rows_backward<T, level>; });
    const auto policies = policy.networks(true), nets = dynamics.networks(true);
    const auto weights = action_weights<T>(p, false);
    const int64_t rows = p.dynamics.sets * p.dynamics.steps * p.dynamics.batch * p.dynamics.widths[1];
    const Memory<T> of_rows(rows);
    dynamics.for_blocks(policy.room() + dynamics.room(), [&](int64_t set, int64_t number, int64_t item, T* work) {
        FlowBlock<T> acts = policy.block(policies[static_cast<size_t>(set)], set, number, work);
        FlowBlock<T> moves = dynamics.block(nets[static_cast<size_t>(set)], set, number, work + policy.room());
        of_acts.lend(acts, of_policy, item);
        of_moves.lend(moves, of_dynamics, item);
        moves.rows = static_cast<const T*>(p.rows);
        moves.grad_rows = of_rows.get();
        LoopBlock<T> loop = loop_block(p, set, weights.get());
        loop.actions = actions;
        loop.grad_offsets = of_offsets;
        run(acts, moves, loop);
    });
    of_acts.finish(of_policy);
}

}  // namespace

void mlp_flow_cpu(const MlpFlow& p, void* result) {
    with_type<float, double>(p.dtype, [&](auto zero) { forward_typed(p, static_cast<decltype(zero)*>(result)); });
}

void mlp_flow_backward_cpu(const MlpFlow& p, const MlpFlowGradients& grads) {
    with_type<float, double>(p.dtype, [&](auto zero) { backward_typed<decltype(zero)>(p, grads); });
}

void closed_loop_cpu(const ClosedLoop& p, void* states, void* actions) {
    with_type<float, double>(p.dynamics.dtype, [&](auto zero) {
        using T = decltype(zero);
        loop_typed(p, static_cast<T*>(states), static_cast<T*>(actions));
    });
}

void closed_loop_backward_cpu(const ClosedLoop& p, const void* actions, const MlpFlowGradients& dynamics, const MlpFlowGradients& policy,
                              void* offsets) {
    with_type<float, double>(p.dynamics.dtype, [&](auto zero) {
        using T = decltype(zero);
        loop_backward_typed(p, static_cast<const T*>(actions), dynamics, policy, static_cast<T*>(offsets));
    });
}

}  // namespace ttcfast
