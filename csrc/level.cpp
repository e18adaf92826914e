#include "level.h"

namespace ttcfast {

Level best_level() {
#ifdef TTCFAST_X86
    // The compiler's support functions also check that the system saves the registers. The features are those of CMakeLists.txt.
    static const Level best = [] {
        __builtin_cpu_init();
        if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::generic;  // each such processor has F16C
        const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
        return wide ? Level::avx512 : Level::avx2;
    }();
    return best;
#else
    return Level::generic;
#endif
}

}  // namespace ttcfast
