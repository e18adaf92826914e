// Every operation once, at one size, on one thread and at the level avx2, for valgrind to count: bench/counts.py builds and runs it.
// A case is an entry of kCases: it makes its inputs, which are not counted, and returns the call, which is.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "accumulate_moments.h"
#include "arm.h"
#include "arm_fields.h"
#include "heun.h"
#include "keyed.h"
#include "mlp_flow.h"
#include "norm_mish.h"
#include "topk.h"

using namespace ttcfast;

// The name that valgrind looks for.
extern "C" __attribute__((noinline)) void counted(const std::function<void()>& call) { call(); }

namespace {

constexpr Level kCounted = Level::avx2;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Numbers in [low, high), the same on every machine (Numerical Recipes' generator of 32 bits).
std::vector<float> numbers(int64_t count, float low = -1, float high = 1, uint32_t seed = 1) {
    std::vector<float> made(count);
    for (float& x : made) {
        seed = seed * 1664525u + 1013904223u;
        x = low + (high - low) * static_cast<float>(seed >> 8) / 16777216.0f;
    }
    return made;
}

std::vector<bfloat16> rounded(const std::vector<float>& values) {
    std::vector<bfloat16> made(values.size());
    for (size_t i = 0; i < values.size(); ++i) narrow(values[i], made[i]);
    return made;
}

// A call, with whatever it needs held by its copies.
using Call = std::function<void()>;
template <class T>
std::shared_ptr<std::vector<T>> shared(std::vector<T> values) {
    return std::make_shared<std::vector<T>>(std::move(values));
}

ArmField contiguous(const void* data, int64_t candidates, int64_t channels, int64_t side) {
    const int64_t cells = side * side;
    return {data, candidates * channels * cells, candidates > 1 ? channels * cells : 0, cells, {cells, side, 1}};
}

// [1, 64, 4, 64, 64] of density, velocity and pressure, which is negative everywhere if `violating`.
Call arm(bool violating) {
    constexpr int64_t kCandidates = 64, kSide = 64, kCells = kSide * kSide;
    const auto state = shared(numbers(4 * kCells, 0.5f, 1.5f)), cand = shared(numbers(kCandidates * 4 * kCells, 0.5f, 1.5f, 2));
    if (violating) {
        for (int64_t b = 0; b < kCandidates; ++b)
            for (int64_t i = 0; i < kCells; ++i) (*cand)[(4 * b + 3) * kCells + i] = -1;
    }
    const auto mask = shared(std::vector<uint8_t>(kCells));
    for (int64_t i = 0; i < kSide; ++i) (*mask)[i] = 1;
    const auto gamma = shared(std::vector<double>{1.4});
    const auto scores = shared(std::vector<float>(6 * kCandidates));
    const auto finite = shared(std::vector<uint8_t>(kCandidates));
    const auto residuals = shared(std::vector<double>(4 * kCandidates));
    ArmProblem p{};
    p.dtype = DType::float32;
    p.problems = 1, p.candidates = kCandidates, p.channels = 4;
    p.extent[0] = 1, p.extent[1] = p.extent[2] = kSide;
    p.state = contiguous(state->data(), 1, 4, kSide), p.cand = contiguous(cand->data(), kCandidates, 4, kSide);
    p.gamma = gamma->data(), p.volume = 1.0 / kCells, p.mask = mask->data(), p.relative = true;
    p.density = 0, p.momentum[0] = 1, p.momentum[1] = 2, p.components = 2, p.pressure = 3, p.energy = -1, p.primitive = true;
    p.mode = Momentum::norm;
    for (double& weight : p.weights) weight = 1;
    p.threads = 1, p.level = kCounted;
    return [=] {
        float* out = scores->data();
        const auto at = [&](int k) { return out + k * kCandidates; };
        arm_cpu(p, {at(0), at(1), at(2), at(3), at(4), at(5), finite->data(), residuals->data()});
        (void)state, (void)cand, (void)mask, (void)gamma;
    };
}

// Shallow water, [1, 64, 3, 64, 64]: mass, momentum, a bound of the depth.
Call arm_fields() {
    constexpr int64_t kCandidates = 64, kSide = 64, kCells = kSide * kSide;
    const auto state = shared(numbers(3 * kCells, 0.6f, 1.6f)), cand = shared(numbers(kCandidates * 3 * kCells, 0.4f, 1.6f, 2));
    const auto scores = shared(std::vector<float>(6 * kCandidates));
    const auto finite = shared(std::vector<uint8_t>(kCandidates));
    FieldsProblem p{};
    p.dtype = DType::float32;
    p.problems = 1, p.candidates = kCandidates, p.channels = 3;
    p.extent[0] = 1, p.extent[1] = p.extent[2] = kSide;
    p.state = contiguous(state->data(), 1, 3, kSide), p.cand = contiguous(cand->data(), kCandidates, 3, kSide);
    p.volume = 1.0 / kCells;
    p.groups = {0, 1, 1}, p.quantities = 2, p.anchored = {1, 1, 1};
    p.low = {0.5, -kInfinity, -kInfinity}, p.high = {kInfinity, kInfinity, kInfinity};
    p.distances = {1.0 / kSide, 1.0 / kSide}, p.periodic = {1, 1};
    p.mode = Momentum::norm, p.weights = {1, 1, 0.1, 0.1, 0.1};
    p.threads = 1, p.level = kCounted;
    return [=] {
        arm_fields_cpu(p, {scores->data(), scores->data() + kCandidates, finite->data()});
        (void)state, (void)cand;
    };
}

Call topk(int64_t rows, int64_t columns, int64_t k) {
    const auto scores = shared(numbers(rows * columns)), values = shared(std::vector<float>(rows * k));
    const auto indices = shared(std::vector<int64_t>(rows * k));
    TopkProblem p{};
    p.dtype = DType::float32, p.rows = rows, p.columns = columns, p.k = k;
    p.scores = scores->data(), p.row_stride = columns, p.column_stride = 1;
    p.values = values->data(), p.indices = indices->data();
    return [=] {
        topk_cpu(p, 1, kCounted);
        (void)scores, (void)values, (void)indices;
    };
}

enum class Keyed { normal, noise, dropout };

// 32 rows of 4x64x64.
Call keyed(Keyed what) {
    constexpr int64_t kRows = 32, kElements = 4 * 64 * 64;
    const auto x = shared(numbers(kRows * kElements)), out = shared(std::vector<float>(kRows * kElements));
    const auto rows = shared(std::vector<int64_t>(2 * kRows)), stream = shared(std::vector<int64_t>{7});
    for (int64_t m = 0; m < kRows; ++m) (*rows)[2 * m + 1] = m;
    const KeyedRows r{rows->data(), kRows, kElements, stream->data(), 3, false, 1, kCounted};
    const KeyedInput input{x->data(), kElements, {1, 1, kElements}, {kElements, kElements, 1}};
    return [=] {
        if (what == Keyed::normal) normal_cpu(r, DType::float32, out->data());
        if (what == Keyed::noise) add_noise_cpu(r, DType::float32, input, 1, 0.1, out->data());
        if (what == Keyed::dropout) keyed_dropout_cpu(r, DType::float32, input, 429496730, 1 / 0.9, out->data());
        (void)x, (void)rows, (void)stream;
    };
}

// [256, 512].
Call heun(int64_t group) {
    constexpr int64_t kCount = 256 * 512;
    const auto base = shared(numbers(kCount)), first = shared(numbers(kCount, -1, 1, 2)), second = shared(numbers(kCount, -1, 1, 3));
    const auto out = shared(std::vector<float>(kCount));
    return [=] {
        heun_cpu({DType::float32, kCount, base->data(), first->data(), second->data(), 0.125, 1.0, group, out->data(), 1, kCounted});
    };
}

// [256, 512].
Call norm_mish(bool backward) {
    constexpr int64_t kRows = 256, kWidth = 512;
    const auto x = shared(numbers(kRows * kWidth)), layer = shared(numbers(3 * kWidth, 0.5f, 1.5f, 2));
    const auto y = shared(std::vector<float>(kRows * kWidth)), grad = shared(numbers(kRows * kWidth, -1, 1, 3));
    const auto of_x = shared(std::vector<float>(kRows * kWidth)), of_layer = shared(std::vector<float>(2 * kWidth));
    const auto stats = shared(std::vector<float>(2 * kRows));
    const float* parameters = layer->data();
    const NormMish p{DType::float32,          kRows, kWidth, x->data(), nullptr, parameters, parameters + kWidth,
                     parameters + 2 * kWidth, 1e-5,  1,      kCounted};
    norm_mish_cpu(p, y->data(), stats->data());
    return [=] {
        if (backward) {
            norm_mish_backward_cpu(p, grad->data(), stats->data(), of_x->data(), nullptr, of_layer->data(), of_layer->data() + kWidth);
        } else {
            norm_mish_cpu(p, y->data(), stats->data());
        }
        (void)x, (void)layer;
    };
}

// 31 tensors of 8,191 gradients, added to float32 totals.
template <class G>
Call moments(std::vector<G> values) {
    constexpr int64_t kTensors = 31, kEach = 8191;
    const auto grads = shared(std::move(values));
    const auto totals = shared(std::vector<float>(kTensors * kEach));
    const auto tensors = shared(std::vector<MomentsTensor>());
    for (int64_t t = 0; t < kTensors; ++t) tensors->push_back({grads->data() + t * kEach, totals->data() + t * kEach, kEach});
    return [=] {
        accumulate_moments_cpu({kDType<G>, DType::float32, false, tensors->data(), kTensors, 1, kCounted});
        (void)grads, (void)totals;
    };
}

// Four steps of Heun's method of [256, 64], two hidden layers of 128, all gradients.
Call mlp_flow(bool backward) {
    constexpr int64_t kBatch = 256, kLatent = 64, kWidth = 128, kSubsteps = 4, kEvaluations = 2 * kSubsteps;
    // Holds every tensor.
    struct Room {
        std::vector<std::vector<float>> held;
        float* drawn(int64_t count, float low = -0.1f, float high = 0.1f) {
            return held.emplace_back(numbers(count, low, high, static_cast<uint32_t>(held.size()))).data();
        }
    };
    const auto room = std::make_shared<Room>();
    MlpFlow p{};
    p.dtype = DType::float32, p.sets = 1, p.batch = kBatch, p.steps = 1, p.substeps = kSubsteps, p.group = 8;
    p.method = Method::heun, p.eps = 1e-5, p.widths = {kLatent, kWidth, kWidth, kLatent};
    p.z = room->drawn(kBatch * kLatent, 0, 1), p.rows = room->drawn(kBatch * kWidth), p.times = room->drawn((kSubsteps + 1) * kWidth);
    MlpFlowGradients grads{};
    grads.result = room->drawn(kBatch * kLatent), grads.z = room->drawn(kBatch * kLatent);
    grads.rows = room->drawn(kBatch * kWidth), grads.times = room->drawn((kSubsteps + 1) * kWidth);
    for (size_t i = 0; i < 3; ++i) {
        const int64_t in = p.widths[i], out = p.widths[i + 1];
        p.weights.push_back(room->drawn(out * in)), p.strides.push_back({out * in, in, 1}), grads.weights.push_back(room->drawn(out * in));
        if (i) p.biases.push_back(room->drawn(out)), grads.biases.push_back(room->drawn(out));
        if (i == 2) continue;
        p.scales.push_back(room->drawn(out, 0.5f, 1.5f)), grads.scales.push_back(room->drawn(out));
        p.shifts.push_back(room->drawn(out)), grads.shifts.push_back(room->drawn(out));
        p.products.push_back(room->drawn(kEvaluations * kBatch * out)), p.stats.push_back(room->drawn(kEvaluations * kBatch * 2));
    }
    p.skips.assign(7, 0);
    p.inputs = room->drawn(kEvaluations * kBatch * kLatent);
    p.threads = 1, p.level = kCounted;
    float* result = room->drawn(kBatch * kLatent);
    mlp_flow_cpu(p, result);
    return [=] {
        backward ? mlp_flow_backward_cpu(p, grads) : mlp_flow_cpu(p, result);
        (void)room;
    };
}

struct Case {
    const char* name;
    Call (*make)();
};

constexpr int64_t kMoments = 31 * 8191;
const Case kCases[] = {
    {"arm", [] { return arm(false); }},
    {"arm, all violating", [] { return arm(true); }},
    {"arm_fields", arm_fields},
    {"topk, 1 row of 1e6, k 256", [] { return topk(1, 1000000, 256); }},
    {"topk, 64 rows of 4096, k 64", [] { return topk(64, 4096, 64); }},
    {"normal", [] { return keyed(Keyed::normal); }},
    {"add_noise", [] { return keyed(Keyed::noise); }},
    {"keyed_dropout", [] { return keyed(Keyed::dropout); }},
    {"heun", [] { return heun(0); }},
    {"heun, groups of 8", [] { return heun(8); }},
    {"mlp_flow", [] { return mlp_flow(false); }},
    {"mlp_flow, backward", [] { return mlp_flow(true); }},
    {"norm_mish", [] { return norm_mish(false); }},
    {"norm_mish, backward", [] { return norm_mish(true); }},
    {"accumulate_moments", [] { return moments(numbers(kMoments)); }},
    {"accumulate_moments, bfloat16", [] { return moments(rounded(numbers(kMoments))); }},
};

}  // namespace

int main() {
    if (best_level() < kCounted) {
        std::fprintf(stderr, "this processor has no AVX2\n");
        return 3;
    }
    std::printf("%s\n", TTCFAST_COMPILER);
    for (const Case& each : kCases) {
        const Call call = each.make();
        call();  // loads symbols, fills what is made once
        std::printf("%s\n", each.name);
        counted(call);
    }
}
