#include <cuda_runtime.h>

#include "device_info.h"

namespace ttcfast {

DeviceInfo device_info() {
    DeviceInfo info{true, CUDART_VERSION, 0, "", {}};
    cudaDriverGetVersion(&info.driver_version);
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();  // clears the error, so that a later call does not report it as its own
        info.reason = cudaGetErrorString(status);
        return info;
    }
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
        info.devices.push_back(
            {properties.name, properties.major, properties.minor, properties.multiProcessorCount, properties.totalGlobalMem});
    }
    if (info.devices.empty()) info.reason = "the CUDA runtime lists no device";
    return info;
}

}  // namespace ttcfast
