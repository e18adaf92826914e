// Runs independent work items on a few threads, torch's or kept ones. Results depend on the items, never on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace ttcfast {

// Calls run(context, worker) here and on at most threads - 1 others, each with a worker of its own below `threads`; returns when all
// calls have. The others are torch's OpenMP threads, or kept ones where there are none and in a forked child. Kept threads that are busy
// or still asleep when the call here returns are not waited for. Any thread may call this at any time, also from within `run`. `run` must
// not throw.
void run_together(int threads, void (*run)(const void* context, int worker), const void* context);

// To be called in a forked child if this library is loaded there; a fork after that is seen. Without it a child whose parent has used
// OpenMP's threads waits for them for ever, as it does in torch's own operations.
void forked();

// Calls work(item, worker) once for every item in [0, items), with worker in [0, threads). If a call throws, no further items are begun,
// and the first exception is thrown here once all threads have left `work`.
template <class Work>
void parallel_for(int64_t items, int threads, const Work& work) {
    const int wanted = static_cast<int>(std::min<int64_t>(threads, items));
    if (wanted <= 1) {
        for (int64_t item = 0; item < items; ++item) work(item, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    const auto drain = [&](int worker) noexcept {
        try {
            for (int64_t item = next++; item < items; item = next++) work(item, worker);
        } catch (...) {
            next = items;
            if (!failed.exchange(true)) error = std::current_exception();
        }
    };
    run_together(wanted, [](const void* context, int worker) { (*static_cast<const decltype(drain)*>(context))(worker); }, &drain);
    if (error) std::rethrow_exception(error);
}

}  // namespace ttcfast
