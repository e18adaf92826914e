#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "topk_plan.h"

namespace ttcfast {
namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string("topk: ") + what + ": " + cudaGetErrorString(status));
}

Plan plan_here(int64_t rows, int64_t columns, int64_t k) {
    int device = 0, multiprocessors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return plan_of(rows, columns, k, multiprocessors);
}

}  // namespace

std::pair<int64_t, int64_t> topk_cuda_workspaces(int64_t rows, int64_t columns, int64_t k) {
    const Plan plan = plan_here(rows, columns, k);
    return {plan.zeroed, plan.scratch};
}

void topk_cuda(const TopkProblem& problem, void* zeroed, void* scratch, void* stream) {
    if (problem.rows == 0) return;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const auto launch = [&](auto kernel, int64_t blocks, auto... arguments) {
        kernel<<<static_cast<unsigned>(blocks), kThreads, 0, queue>>>(arguments...);
        check(cudaGetLastError(), "launch");
    };
    run_topk(problem, plan_here(problem.rows, problem.columns, problem.k), zeroed, scratch, launch);
}

}  // namespace ttcfast
