// How an operation gets one body per instruction set.
//
//   <op>_loop.cpp  holds its hot loops. CMakeLists.txt compiles the file once per Level, with the flags of that instruction set and
//                  with TTCFAST_LEVEL defined as its name.
//   <op>_loop.h    declares what the file offers, as a template over the level:     template <class T, Level level> void heun_run(...);
//   <op>_loop.cpp  ends with an explicit instantiation for each element type:       template void heun_run<float, kLevel>(...);
//   <op>_cpu.cpp   takes the one to run:              at_level(p.level, [](auto level) { return &heun_run<float, level>; })(...);
//
// Everything else in <op>_loop.cpp has internal linkage and calls no inline function of the standard library; otherwise the linker could
// take a copy compiled for a newer processor for code that must run on an older one. All levels perform the same IEEE operations in the
// same order, without contraction, and therefore return the same bits.
#pragma once

#include <type_traits>

namespace ttcfast {

enum class Level : int { generic = 0, avx2 = 1, avx512 = 2 };  // generic: the features of every processor of the architecture

constexpr const char* kLevelNames[] = {"generic", "avx2", "avx512"};

// The highest level in this build that this processor and its system can run; lower levels run too.
Level best_level();

// Calls take(constant), where constant is `asked` as a std::integral_constant, or the best level if `asked` exceeds it.
template <class Take>
auto at_level(Level asked, const Take& take) {
#ifdef TTCFAST_X86
    const Level best = best_level(), level = asked < best ? asked : best;
    if (level == Level::avx512) return take(std::integral_constant<Level, Level::avx512>());
    if (level == Level::avx2) return take(std::integral_constant<Level, Level::avx2>());
#endif
    (void)asked;
    return take(std::integral_constant<Level, Level::generic>());
}

#ifdef TTCFAST_LEVEL
constexpr Level kLevel = Level::TTCFAST_LEVEL;
#endif

}  // namespace ttcfast
