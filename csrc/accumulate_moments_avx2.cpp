// Compiled with -mavx2 -mf16c (CMakeLists.txt).
#include "accumulate_moments_run.h"

namespace ttcfast {

const MomentsVariant* moments_avx2() { return kVariants; }

}  // namespace ttcfast
