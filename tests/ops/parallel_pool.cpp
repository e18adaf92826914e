// What csrc/parallel.h promises, by a program of its own that tests/ops/test_parallel.py builds. The argument names one promise.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/parallel.h"

using ttcfast::parallel_for;

// Whether every item is worked on once, by workers below `threads` whose own counters nobody else changes meanwhile.
bool adds_up(int64_t items, int threads) {
    std::vector<int> done(static_cast<size_t>(items));
    std::vector<int64_t> of_worker(static_cast<size_t>(threads));
    parallel_for(items, threads, [&](int64_t item, int worker) {
        ++done[static_cast<size_t>(item)];
        of_worker.at(static_cast<size_t>(worker)) += 1;
    });
    for (int times : done) {
        if (times != 1) return false;
    }
    return std::accumulate(of_worker.begin(), of_worker.end(), int64_t(0)) == items;
}

bool all_add_up() {
    for (int turn = 0; turn < 200; ++turn) {
        for (const int64_t items : {0, 1, 2, 3, 17, 1000}) {
            for (const int threads : {1, 2, 3, 8}) {
                if (!adds_up(items, threads)) return false;
            }
        }
    }
    return true;
}

// Distinct threads, since each waits for the other.
bool together() {
    std::atomic<int> here{0};
    std::thread::id ids[2];
    parallel_for(2, 2, [&](int64_t item, int) {
        ids[item] = std::this_thread::get_id();
        ++here;
        while (here < 2) std::this_thread::yield();
    });
    return ids[0] != ids[1];
}

bool kept() {
    std::set<std::thread::id> seen;
    for (int turn = 0; turn < 20; ++turn) {
        std::thread::id other;
        std::atomic<int> here{0};
        const auto mine = std::this_thread::get_id();
        parallel_for(2, 2, [&](int64_t, int) {
            if (std::this_thread::get_id() != mine) other = std::this_thread::get_id();
            ++here;
            while (here < 2) std::this_thread::yield();
        });
        seen.insert(other);
        if (turn % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until it sleeps
    }
    return seen.size() == 1;
}

bool nested() {
    std::atomic<int64_t> total{0};
    parallel_for(8, 4, [&](int64_t, int) { parallel_for(100, 4, [&](int64_t item, int) { total += item; }); });
    return total == 8 * 4950;
}

bool several_callers() {
    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int turn = 0; turn < 300; ++turn) right = adds_up(turn % 50, 1 + turn % 4) && right;
        });
    }
    for (auto& caller : callers) caller.join();
    return right;
}

bool exceptions() {
    for (int turn = 0; turn < 100; ++turn) {
        std::atomic<int> begun{0};
        try {
            parallel_for(1000, 4, [&](int64_t item, int) {
                ++begun;
                if (item == turn) throw std::runtime_error("as asked");
                std::this_thread::yield();
            });
            return false;
        } catch (const std::runtime_error& error) {
            if (std::strcmp(error.what(), "as asked") != 0 || begun == 1000) return false;
        }
    }
    return all_add_up();
}

double cpu_seconds() {
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    return static_cast<double>(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           1e-6 * static_cast<double>(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

// Threads without work sleep: their processor time is a hundredth of the time that passes.
bool idle() {
    together();
    adds_up(100, 8);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const double before = cpu_seconds();
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    return cpu_seconds() - before < 0.003;
}

// A child has threads of its own, also if others were at work when it was made.
bool forked() {
    together();
    std::atomic<bool> stop{false};
    std::thread busy([&] {
        while (!stop) adds_up(50, 3);
    });
    bool right = true;
    for (int turn = 0; turn < 20; ++turn) {
        const pid_t child = fork();
        if (child == 0) _exit(together() && adds_up(1000, 3) && together() ? 0 : 1);
        int status = -1;
        right = waitpid(child, &status, 0) == child && status == 0 && right;
    }
    stop = true;
    busy.join();
    return right && together();
}

int main(int, char** arguments) {
    const struct {
        const char* name;
        bool (*holds)();
    } promises[] = {{"all_add_up", all_add_up},           {"together", together},     {"kept", kept}, {"nested", nested},
                    {"several_callers", several_callers}, {"exceptions", exceptions}, {"idle", idle}, {"forked", forked}};
    for (const auto& promise : promises) {
        if (std::strcmp(promise.name, arguments[1]) == 0) return promise.holds() ? 0 : 1;
    }
    std::printf("no promise %s\n", arguments[1]);
    return 2;
}
