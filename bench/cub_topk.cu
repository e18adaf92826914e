// CUB's DeviceTopK behind a C function, for bench/cub_topk.py; needs the headers of CCCL 3.2 or newer (the wheel nvidia-cuda-cccl).
#include <cuda_runtime.h>

#include <cub/device/device_topk.cuh>
#include <cuda/std/execution>
#include <cuda/stream_ref>
#include <thrust/iterator/counting_iterator.h>

// Unordered keys and positions of the k largest. With storage null, only storage_bytes is written.
extern "C" int cub_topk(const float* scores, int n, int k, float* values, int* positions, void* storage, size_t* storage_bytes, void* stream) {
    const auto wanted = cuda::execution::require(cuda::execution::determinism::not_guaranteed, cuda::execution::output_ordering::unsorted);
    const cuda::stream_ref queue{static_cast<cudaStream_t>(stream)};
    const auto environment = cuda::std::execution::env{queue, wanted};
    return cub::DeviceTopK::MaxPairs(storage, *storage_bytes, scores, values, thrust::counting_iterator<int>(0), positions, n, k, environment);
}
