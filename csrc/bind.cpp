// ttcfast._C: takes raw pointers, sizes, strides and dtype codes, and knows nothing of torch. Arguments are checked in ttcfast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "accumulate_moments.h"
#include "arm.h"
#include "arm_fields.h"
#include "device_info.h"
#include "heun.h"
#include "keyed.h"
#include "memory.h"
#include "mlp_flow.h"
#include "norm_mish.h"
#include "parallel.h"
#include "topk.h"

#define TTCFAST_ABI 7  // the same as ABI in ttcfast/ops/native.py

namespace py = pybind11;
using namespace ttcfast;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// strides: problem, candidate, channel, s0, s1, s2.
ArmField field(uintptr_t data, const std::array<int64_t, 6>& s) { return {pointer<void>(data), s[0], s[1], s[2], {s[3], s[4], s[5]}}; }

void arm(int dtype, const std::array<int64_t, 6>& sizes, uintptr_t state, const std::array<int64_t, 6>& state_strides, uintptr_t cand,
         const std::array<int64_t, 6>& cand_strides, uintptr_t gamma, uintptr_t volumes, double volume, uintptr_t mask, uintptr_t values,
         double value, uintptr_t expected, bool relative, int density, const std::vector<int>& momentum, int energy, int pressure,
         bool primitive, int mode, const std::array<double, 5>& weights, const std::array<uintptr_t, 8>& out, int threads, int level) {
    ArmProblem problem{};
    problem.dtype = static_cast<DType>(dtype);
    problem.problems = sizes[0];
    problem.candidates = sizes[1];
    problem.channels = sizes[2];
    for (int axis = 0; axis < 3; ++axis) problem.extent[axis] = sizes[3 + axis];
    problem.state = field(state, state_strides);
    problem.cand = field(cand, cand_strides);
    problem.gamma = pointer<const double>(gamma);
    problem.volumes = pointer<const void>(volumes);
    problem.volume = volume;
    problem.mask = pointer<const uint8_t>(mask);
    problem.values = pointer<const void>(values);
    problem.value = value;
    problem.expected = pointer<const double>(expected);
    problem.relative = relative;
    problem.density = density;
    problem.energy = energy;
    problem.pressure = pressure;
    problem.components = static_cast<int>(momentum.size());
    for (size_t k = 0; k < momentum.size() && k < 3; ++k) problem.momentum[k] = momentum[k];
    problem.primitive = primitive;
    problem.mode = static_cast<Momentum>(mode);
    for (int k = 0; k < 5; ++k) problem.weights[k] = weights[k];
    problem.threads = threads;
    problem.level = static_cast<Level>(level);
    const ArmOutput output{pointer<void>(out[0]), pointer<void>(out[1]), pointer<void>(out[2]),    pointer<void>(out[3]),
                           pointer<void>(out[4]), pointer<void>(out[5]), pointer<uint8_t>(out[6]), pointer<double>(out[7])};
    py::gil_scoped_release release;
    arm_cpu(problem, output);
}

// fields: volumes, mask, values, expected, units. out: score, penalties, finite.
void arm_fields(int dtype, const std::array<int64_t, 6>& sizes, uintptr_t state, const std::array<int64_t, 6>& state_strides,
                uintptr_t cand, const std::array<int64_t, 6>& cand_strides, const std::array<uintptr_t, 5>& fields, double volume,
                double value, const std::vector<int64_t>& groups, int64_t quantities, const std::vector<int64_t>& anchored,
                const std::vector<double>& low, const std::vector<double>& high, const std::vector<int64_t>& vectors,
                const std::vector<double>& distances, const std::vector<int64_t>& periodic, int mode, const std::vector<double>& weights,
                const std::array<uintptr_t, 3>& out, int threads, int level) {
    const FieldsProblem problem{static_cast<DType>(dtype),
                                sizes[0],
                                sizes[1],
                                sizes[2],
                                {sizes[3], sizes[4], sizes[5]},
                                field(state, state_strides),
                                field(cand, cand_strides),
                                pointer<const void>(fields[0]),
                                volume,
                                pointer<const uint8_t>(fields[1]),
                                pointer<const void>(fields[2]),
                                value,
                                pointer<const double>(fields[3]),
                                pointer<const double>(fields[4]),
                                groups,
                                quantities,
                                anchored,
                                low,
                                high,
                                vectors,
                                distances,
                                periodic,
                                static_cast<Momentum>(mode),
                                weights,
                                threads,
                                static_cast<Level>(level)};
    const FieldsOutput output{pointer<void>(out[0]), pointer<void>(out[1]), pointer<uint8_t>(out[2])};
    py::gil_scoped_release release;
    arm_fields_cpu(problem, output);
}

// sizes: rows, elements of a row. The arguments of every keyed operation, in the order of ttcfast/ops/keyed.py.
KeyedRows keyed_rows(uintptr_t rows, const std::array<int64_t, 2>& sizes, uintptr_t stream, int64_t site, bool antithetic, int threads,
                     int level) {
    return {pointer<const int64_t>(rows), sizes[0], sizes[1], pointer<const int64_t>(stream), site, antithetic, threads,
            static_cast<Level>(level)};
}

// x: row stride, three sizes, three strides.
KeyedInput keyed_input(uintptr_t data, const std::array<int64_t, 7>& x) {
    return {pointer<const void>(data), x[0], {x[1], x[2], x[3]}, {x[4], x[5], x[6]}};
}

void normal(int dtype, uintptr_t out, uintptr_t rows, const std::array<int64_t, 2>& sizes, uintptr_t stream, int64_t site, bool antithetic,
            int threads, int level) {
    const KeyedRows keyed = keyed_rows(rows, sizes, stream, site, antithetic, threads, level);
    py::gil_scoped_release release;
    normal_cpu(keyed, static_cast<DType>(dtype), pointer<void>(out));
}

void add_noise(int dtype, uintptr_t out, uintptr_t x, const std::array<int64_t, 7>& layout, int64_t copies, double sigma, uintptr_t rows,
               const std::array<int64_t, 2>& sizes, uintptr_t stream, int64_t site, bool antithetic, int threads, int level) {
    const KeyedRows keyed = keyed_rows(rows, sizes, stream, site, antithetic, threads, level);
    py::gil_scoped_release release;
    add_noise_cpu(keyed, static_cast<DType>(dtype), keyed_input(x, layout), copies, sigma, pointer<void>(out));
}

void keyed_dropout(int dtype, uintptr_t out, uintptr_t x, const std::array<int64_t, 7>& layout, uint64_t threshold, double scale,
                   uintptr_t rows, const std::array<int64_t, 2>& sizes, uintptr_t stream, int64_t site, bool antithetic, int threads,
                   int level) {
    const KeyedRows keyed = keyed_rows(rows, sizes, stream, site, antithetic, threads, level);
    py::gil_scoped_release release;
    keyed_dropout_cpu(keyed, static_cast<DType>(dtype), keyed_input(x, layout), threshold, scale, pointer<void>(out));
}

std::vector<uint32_t> keyed_words(uint64_t key, uint32_t problem, uint64_t candidate, int64_t first, int64_t n, int level) {
    std::vector<uint32_t> words(n);
    keyed_words_cpu(key, problem, candidate, first, n, static_cast<Level>(level), words.data());
    return words;
}

// Names of the instruction sets that can run here, each including those before it.
py::tuple cpu_levels() {
    py::list names;
    for (int level = 0; level <= static_cast<int>(best_level()); ++level) names.append(kLevelNames[level]);
    return py::tuple(names);
}

double accumulate_moments(int grad_dtype, int total_dtype, const std::vector<uintptr_t>& grads, const std::vector<uintptr_t>& totals,
                          const std::vector<int64_t>& counts, bool zero_grads, int threads, int level) {
    std::vector<MomentsTensor> tensors(grads.size());
    for (size_t k = 0; k < grads.size(); ++k) {
        tensors[k] = {pointer<void>(grads[k]), totals.empty() ? nullptr : pointer<void>(totals[k]), counts[k]};
    }
    const MomentsProblem problem{static_cast<DType>(grad_dtype),
                                 static_cast<DType>(total_dtype),
                                 zero_grads,
                                 tensors.data(),
                                 static_cast<int64_t>(tensors.size()),
                                 threads,
                                 static_cast<Level>(level)};
    py::gil_scoped_release release;
    return accumulate_moments_cpu(problem);
}

void heun(int dtype, int64_t count, uintptr_t base, uintptr_t first, uintptr_t second, double step, double ratio, int64_t group,
          uintptr_t out, int threads, int level) {
    const HeunUpdate update{static_cast<DType>(dtype),
                            count,
                            pointer<const void>(base),
                            pointer<const void>(first),
                            pointer<const void>(second),
                            step,
                            ratio,
                            group,
                            pointer<void>(out),
                            threads,
                            static_cast<Level>(level)};
    py::gil_scoped_release release;
    heun_cpu(update);
}

// in: x, rows, bias, scale, shift.
NormMish norm_mish_problem(int dtype, int64_t count, int64_t width, const std::array<uintptr_t, 5>& in, double eps, int threads,
                           int level) {
    return {static_cast<DType>(dtype),
            count,
            width,
            pointer<const void>(in[0]),
            pointer<const void>(in[1]),
            pointer<const void>(in[2]),
            pointer<const void>(in[3]),
            pointer<const void>(in[4]),
            eps,
            threads,
            static_cast<Level>(level)};
}

void norm_mish(int dtype, int64_t count, int64_t width, const std::array<uintptr_t, 5>& in, double eps, int threads, int level, uintptr_t y,
               uintptr_t stats) {
    const NormMish problem = norm_mish_problem(dtype, count, width, in, eps, threads, level);
    py::gil_scoped_release release;
    norm_mish_cpu(problem, pointer<void>(y), pointer<void>(stats));
}

// out: gradient of x, y, gradients of scale and shift.
void norm_mish_backward(int dtype, int64_t count, int64_t width, const std::array<uintptr_t, 5>& in, double eps, int threads, int level,
                        uintptr_t grad, uintptr_t stats, const std::array<uintptr_t, 4>& out) {
    const NormMish problem = norm_mish_problem(dtype, count, width, in, eps, threads, level);
    py::gil_scoped_release release;
    norm_mish_backward_cpu(problem, pointer<const void>(grad), pointer<const void>(stats), pointer<void>(out[0]), pointer<void>(out[1]),
                           pointer<void>(out[2]), pointer<void>(out[3]));
}

template <class P>
std::vector<P*> pointers(const std::vector<uintptr_t>& addresses, size_t first, size_t count) {
    std::vector<P*> found(count);
    for (size_t i = 0; i < count; ++i) found[i] = pointer<P>(addresses[first + i]);
    return found;
}

// sizes: sets, batch, steps, substeps, group, method. in: z, rows, times, weights, biases, scales, shifts. kept: products, stats and, if
// weights are trained, inputs.
MlpFlow mlp_flow_problem(int dtype, const std::array<int64_t, 6>& sizes, double eps, const std::vector<int64_t>& widths,
                         const std::vector<std::array<int64_t, 3>>& strides, const std::vector<int64_t>& skips,
                         const std::vector<uintptr_t>& in, const std::vector<uintptr_t>& kept, int threads, int level) {
    const size_t hidden = widths.size() - 2, held = kept.empty() ? 0 : hidden;
    MlpFlow p{};
    p.dtype = static_cast<DType>(dtype);
    p.sets = sizes[0];
    p.batch = sizes[1];
    p.steps = sizes[2];
    p.substeps = sizes[3];
    p.group = sizes[4];
    p.method = static_cast<Method>(sizes[5]);
    p.eps = eps;
    p.widths = widths;
    p.z = pointer<const void>(in[0]);
    p.rows = pointer<const void>(in[1]);
    p.times = pointer<const void>(in[2]);
    p.weights = pointers<const void>(in, 3, hidden + 1);
    p.strides = strides;
    p.skips = skips;
    p.biases = pointers<const void>(in, 4 + hidden, hidden);
    p.scales = pointers<const void>(in, 4 + 2 * hidden, hidden);
    p.shifts = pointers<const void>(in, 4 + 3 * hidden, hidden);
    p.products = pointers<void>(kept, 0, held);
    p.stats = pointers<void>(kept, held, held);
    p.inputs = kept.size() > 2 * held ? pointer<void>(kept.back()) : nullptr;
    p.threads = threads;
    p.level = static_cast<Level>(level);
    return p;
}

void mlp_flow(const MlpFlow& problem, uintptr_t result) {
    py::gil_scoped_release release;
    mlp_flow_cpu(problem, pointer<void>(result));
}

// out: gradients of z and rows and, if weights are trained, of times, weights, biases, scales, shifts.
MlpFlowGradients mlp_flow_gradients(const MlpFlow& problem, uintptr_t grad, const std::vector<uintptr_t>& out) {
    const size_t hidden = problem.widths.size() - 2;
    MlpFlowGradients grads{pointer<const void>(grad), pointer<void>(out[0]), pointer<void>(out[1]), nullptr, {}, {}, {}, {}};
    if (out.size() > 2) {
        grads.times = pointer<void>(out[2]);
        grads.weights = pointers<void>(out, 3, hidden + 1);
        grads.biases = pointers<void>(out, 4 + hidden, hidden);
        grads.scales = pointers<void>(out, 4 + 2 * hidden, hidden);
        grads.shifts = pointers<void>(out, 4 + 3 * hidden, hidden);
    }
    return grads;
}

void mlp_flow_backward(const MlpFlow& problem, uintptr_t grad, const std::vector<uintptr_t>& out) {
    const MlpFlowGradients grads = mlp_flow_gradients(problem, grad, out);
    py::gil_scoped_release release;
    mlp_flow_backward_cpu(problem, grads);
}

// loop: offsets, weight, rows.
ClosedLoop closed_loop_problem(const MlpFlow& policy, const MlpFlow& dynamics, const std::array<uintptr_t, 3>& loop,
                               const std::array<int64_t, 3>& strides, bool detach) {
    return {policy, dynamics, pointer<const void>(loop[0]), pointer<const void>(loop[1]), strides, pointer<void>(loop[2]), detach};
}

void closed_loop(const MlpFlow& policy, const MlpFlow& dynamics, const std::array<uintptr_t, 3>& loop,
                 const std::array<int64_t, 3>& strides, bool detach, uintptr_t states, uintptr_t actions) {
    const ClosedLoop problem = closed_loop_problem(policy, dynamics, loop, strides, detach);
    py::gil_scoped_release release;
    closed_loop_cpu(problem, pointer<void>(states), pointer<void>(actions));
}

// grads: of states and actions. out: gradients of z and offsets, of_policy: as for mlp_flow_backward.
void closed_loop_backward(const MlpFlow& policy, const MlpFlow& dynamics, const std::array<uintptr_t, 3>& loop,
                          const std::array<int64_t, 3>& strides, bool detach, uintptr_t actions, const std::array<uintptr_t, 2>& grads,
                          const std::array<uintptr_t, 2>& out, const std::vector<uintptr_t>& of_policy) {
    const ClosedLoop problem = closed_loop_problem(policy, dynamics, loop, strides, detach);
    const MlpFlowGradients acts = mlp_flow_gradients(policy, grads[1], of_policy);
    const MlpFlowGradients moves = mlp_flow_gradients(dynamics, grads[0], {out[0], 0});
    py::gil_scoped_release release;
    closed_loop_backward_cpu(problem, pointer<const void>(actions), moves, acts, pointer<void>(out[1]));
}

// sizes: rows, columns, k. Strides of the scores and of the ids: row, column. out: values, indices.
TopkProblem topk_problem(int dtype, const std::array<int64_t, 3>& sizes, uintptr_t scores, const std::array<int64_t, 2>& strides,
                         uintptr_t ids, const std::array<int64_t, 2>& id_strides, const std::array<uintptr_t, 2>& out) {
    return {static_cast<DType>(dtype),
            sizes[0],
            sizes[1],
            sizes[2],
            pointer<const void>(scores),
            strides[0],
            strides[1],
            pointer<const int64_t>(ids),
            id_strides[0],
            id_strides[1],
            pointer<void>(out[0]),
            pointer<int64_t>(out[1])};
}

void topk(int dtype, const std::array<int64_t, 3>& sizes, uintptr_t scores, const std::array<int64_t, 2>& strides, uintptr_t ids,
          const std::array<int64_t, 2>& id_strides, const std::array<uintptr_t, 2>& out, int threads, int level) {
    const TopkProblem problem = topk_problem(dtype, sizes, scores, strides, ids, id_strides, out);
    py::gil_scoped_release release;
    topk_cpu(problem, threads, static_cast<Level>(level));
}

#ifdef TTCFAST_HAS_CUDA
void topk_on_cuda(int dtype, const std::array<int64_t, 3>& sizes, uintptr_t scores, const std::array<int64_t, 2>& strides, uintptr_t ids,
                  const std::array<int64_t, 2>& id_strides, const std::array<uintptr_t, 2>& out, uintptr_t zeroed, uintptr_t scratch,
                  uintptr_t stream) {
    const TopkProblem problem = topk_problem(dtype, sizes, scores, strides, ids, id_strides, out);
    py::gil_scoped_release release;
    topk_cuda(problem, pointer<void>(zeroed), pointer<void>(scratch), pointer<void>(stream));
}
#endif

py::dict info() {
    const DeviceInfo found = device_info();
    py::list devices;
    for (const Device& d : found.devices) {
        py::dict device;
        device["name"] = d.name;
        device["capability"] = py::make_tuple(d.major, d.minor);
        device["multiprocessors"] = d.multiprocessors;
        device["memory_bytes"] = d.memory_bytes;
        devices.append(device);
    }
    py::dict result;
    result["built_with_cuda"] = found.built_with_cuda;
    result["runtime_version"] = found.runtime_version;
    result["driver_version"] = found.driver_version;
    result["reason"] = found.reason;
    result["devices"] = devices;
    return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.attr("abi") = TTCFAST_ABI;
    m.attr("compiler") = TTCFAST_COMPILER;
    m.def("add_noise", &add_noise);
    m.attr("cpu_levels") = cpu_levels();
    m.def("forked", &ttcfast::forked, "Says that this process is the child of a fork, where it is loaded after that.");
    m.def("accumulate_moments", &accumulate_moments);
    m.def("arm", &arm);
    m.def("arm_fields", &arm_fields);
    m.def("device_info", &info);
    m.def("keyed_dropout", &keyed_dropout);
    m.def("keyed_words", &keyed_words);
    m.def("normal", &normal);
    m.def("heun", &heun);
    py::class_<MlpFlow>(m, "MlpFlow");
    py::class_<Memory<char>>(m, "Memory").def(py::init<int64_t>()).def("address", [](const Memory<char>& memory) {
        return reinterpret_cast<uintptr_t>(memory.get());
    });
    m.def("closed_loop", &closed_loop);
    m.def("closed_loop_backward", &closed_loop_backward);
    m.def("mlp_flow_problem", &mlp_flow_problem);
    m.def("mlp_flow", &mlp_flow);
    m.def("mlp_flow_backward", &mlp_flow_backward);
    m.def("norm_mish", &norm_mish);
    m.def("norm_mish_backward", &norm_mish_backward);
    m.def("topk", &topk);
#ifdef TTCFAST_HAS_CUDA
    m.def("topk_cuda", &topk_on_cuda);
    m.def("topk_cuda_workspaces", &topk_cuda_workspaces);
#endif
}
