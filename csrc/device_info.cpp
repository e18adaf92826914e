// Compiled if the extension is built without CUDA, in place of device_info.cu.
#include "device_info.h"

namespace ttcfast {

DeviceInfo device_info() { return {false, 0, 0, "the extension was built without CUDA (TTCFAST_CUDA=OFF, or no CUDA compiler)", {}}; }

}  // namespace ttcfast
