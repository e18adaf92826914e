// CUDA information: the runtime that the extension was built for and the devices that it sees.
#pragma once

#include <string>
#include <vector>

namespace ttcfast {

struct Device {
    std::string name;
    int major, minor;  // compute capability
    int multiprocessors;
    size_t memory_bytes;
};

struct DeviceInfo {
    bool built_with_cuda;
    int runtime_version;  // 1000 major + 10 minor, CUDA's encoding; 0 without CUDA
    int driver_version;   // newest runtime that the driver supports; 0 without a driver
    std::string reason;   // why `devices` is empty; empty if it is not
    std::vector<Device> devices;
};

DeviceInfo device_info();

}  // namespace ttcfast
