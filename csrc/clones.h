// Functions compiled once for every x86-64 machine and once more for those with AVX2; the loader takes the one that fits the machine.
// Without contraction (CMakeLists.txt) both give the same bits.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define TTCFAST_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define TTCFAST_CLONES
#endif

#if defined(__GNUC__)
#define TTCFAST_INLINE inline __attribute__((always_inline))  // into each of the clones, so that it is compiled for their machine
#else
#define TTCFAST_INLINE inline
#endif
