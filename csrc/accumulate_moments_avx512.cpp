// Compiled with -mavx512f -mf16c (CMakeLists.txt).
#include "accumulate_moments_run.h"

namespace ttcfast {

const MomentsVariant* moments_avx512() { return kVariants; }

}  // namespace ttcfast
