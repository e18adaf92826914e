// Runs independent work items on a few threads. Results depend on the items, never on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace ttcfast {

// Calls work(item, worker) once for every item in [0, items), with worker in [0, threads). `work` must not throw.
template <class Work>
void parallel_for(int64_t items, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    auto drain = [&](int worker) {
        for (int64_t item = next++; item < items; item = next++) work(item, worker);
    };
    std::vector<std::thread> others;
    const int wanted = static_cast<int>(std::min<int64_t>(threads, items)) - 1;
    others.reserve(std::max(wanted, 0));
    for (int worker = 1; worker <= wanted; ++worker) {
        try {
            others.emplace_back(drain, worker);
        } catch (const std::exception&) {
            break;  // no thread or memory available (system_error, bad_alloc): the running threads do the work and are joined below
        }
    }
    drain(0);
    for (auto& thread : others) thread.join();
}

}  // namespace ttcfast
