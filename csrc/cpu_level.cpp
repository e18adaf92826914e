#include "cpu_level.h"

namespace ttcfast {

CpuLevel best_cpu_level() {
#ifdef TTCFAST_X86
    // The compiler's own support functions also ask whether the system saves the registers.
    static const CpuLevel best = [] {
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2")) return CpuLevel::generic;
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        return wide ? CpuLevel::avx512 : CpuLevel::avx2;
    }();
    return best;
#else
    return CpuLevel::generic;
#endif
}

}  // namespace ttcfast
