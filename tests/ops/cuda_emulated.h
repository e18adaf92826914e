// Runs CUDA kernels on the CPU, for their logic: every thread of a block is a coroutine that gives way where it waits for others. Blocks
// run one after another, in the order given, so that "the last block to arrive" is any of them. Races are not found; compute-sanitizer does
// that.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx;
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulated {

constexpr int kStack = 64 << 10;

// Those who meet: a block at __syncthreads, a warp at __shfl_sync.
struct Meeting {
    unsigned members = 0, waiting = 0, round = 0;
};

struct Block {
    std::vector<ucontext_t> threads;
    std::vector<char> done;
    std::vector<std::vector<char>> stacks;
    ucontext_t scheduler;
    Meeting all;
    std::vector<Meeting> warps;
    std::vector<unsigned long long> deposits;  // of each thread, for odd and even rounds
    std::function<void()> body;
    unsigned current = 0;
};
inline Block block;

inline void give_way() { swapcontext(&block.threads[block.current], &block.scheduler); }

inline void meet(Meeting& meeting) {
    const unsigned round = meeting.round, self = block.current;
    if (++meeting.waiting == meeting.members) {
        meeting.waiting = 0;
        ++meeting.round;
    }
    while (meeting.round == round) give_way();
    threadIdx.x = self;
}

inline void enter() {
    block.body();
    const unsigned self = block.current;
    block.done[self] = 1;
    // Threads that have ended are not waited for.
    for (Meeting* meeting : {&block.all, &block.warps[self / 32]}) {
        if (--meeting->members != 0 && meeting->waiting == meeting->members) {
            meeting->waiting = 0;
            ++meeting->round;
        }
    }
    for (;;) give_way();
}

inline void run_block(unsigned number, unsigned threads, const std::function<void()>& body) {
    blockIdx.x = number;
    block.body = body;
    block.threads.resize(threads);
    block.done.assign(threads, 0);
    block.stacks.resize(threads);
    block.all = {threads, 0, 0};
    block.warps.assign(threads / 32, {32, 0, 0});
    block.deposits.assign(2 * threads, 0);
    for (unsigned t = 0; t < threads; ++t) {
        block.stacks[t].resize(kStack);
        getcontext(&block.threads[t]);
        block.threads[t].uc_stack.ss_sp = block.stacks[t].data();
        block.threads[t].uc_stack.ss_size = kStack;
        block.threads[t].uc_link = nullptr;
        makecontext(&block.threads[t], enter, 0);
    }
    for (unsigned left = threads, idle = 0; left > 0;) {
        const unsigned before = left;
        const unsigned rounds = block.all.round;
        left = 0;
        for (unsigned t = 0; t < threads; ++t) {
            if (block.done[t]) continue;
            block.current = threadIdx.x = t;
            swapcontext(&block.scheduler, &block.threads[t]);
            left += !block.done[t];
        }
        idle = left == before && rounds == block.all.round ? idle + 1 : 0;
        if (idle > 1000000) {
            std::fprintf(stderr, "threads wait for others that never come\n");
            std::abort();
        }
    }
}

template <class T>
unsigned long long bits_of(T x) {
    unsigned long long bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}
template <class T>
T value_of(unsigned long long bits) {
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Everybody's contribution in this round of the warp.
template <class T>
const unsigned long long* exchange(T x) {
    const unsigned self = block.current;
    Meeting& warp = block.warps[self / 32];
    const unsigned half = warp.round % 2 * static_cast<unsigned>(block.threads.size());
    block.deposits[half + self] = bits_of(x);
    meet(warp);
    return &block.deposits[half + self / 32 * 32];
}

}  // namespace emulated

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

inline void __syncthreads() { emulated::meet(emulated::block.all); }
inline void __threadfence() {}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulated::value_of<T>(emulated::exchange(x)[lane]);
}
template <class T>
T __shfl_up_sync(unsigned, T x, unsigned step) {
    const unsigned lane = emulated::block.current % 32;
    const unsigned long long* all = emulated::exchange(x);
    return lane < step ? x : emulated::value_of<T>(all[lane - step]);
}
inline unsigned __ballot_sync(unsigned, bool yes) {
    const unsigned long long* all = emulated::exchange(yes);
    unsigned mask = 0;
    for (unsigned lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(all[lane] != 0) << lane;
    return mask;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned atomicAdd(unsigned* at, unsigned x) {
    const unsigned before = *at;
    *at += x;
    return before;
}
template <class T>
T __ldcg(const T* at) {
    return *at;
}
