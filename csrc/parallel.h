// Runs independent work items on a few threads, which are kept for the next call. Results depend on the items, never on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace ttcfast {

// Calls run(context, 0) here and run(context, worker) on at most threads - 1 kept threads, each with a worker of its own below `threads`;
// returns when all calls have. Threads that are busy or still asleep when run(context, 0) returns are not waited for, so any thread may
// call this at any time, also from within `run` and in a forked child. `run` must not throw.
void run_together(int threads, void (*run)(const void* context, int worker), const void* context);

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
