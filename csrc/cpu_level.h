// The instruction sets that hot loops are compiled for besides the one every processor of the architecture has.
#pragma once

namespace ttcfast {

enum class CpuLevel : int { generic = 0, avx2 = 1, avx512 = 2 };

constexpr const char* kCpuLevelNames[] = {"generic", "avx2", "avx512"};

// The highest one that this build holds and this processor and its system can run; those below it run too.
CpuLevel best_cpu_level();

}  // namespace ttcfast
