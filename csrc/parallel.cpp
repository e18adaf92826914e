#include "parallel.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace ttcfast {
namespace {

// How long a thread without work looks for some before it sleeps: about what waking it costs, several times over, and the pause between
// two operations that are called one after another.
constexpr std::chrono::microseconds kSpin(50);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#else
    std::this_thread::yield();
#endif
}

template <class Done>
bool spin_until(const Done& done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

// Sleeps until `ready`. condition_variable::wait would need the libstdc++ of gcc 12, and a wheel its tag; the time limit does nothing.
template <class Ready>
void wait(std::condition_variable& told, std::unique_lock<std::mutex>& lock, const Ready& ready) {
    while (!told.wait_until(lock, std::chrono::system_clock::now() + std::chrono::hours(1), ready)) {
    }
}

struct Call {
    void (*run)(const void*, int);
    const void* context;
    int seats;                    // for kept threads
    int taken = 0;                // of the seats; no more once the call has been closed
    std::atomic<int> running{0};  // kept threads inside `run`; the last access of each to the call
    Call* later = nullptr;        // next in the list of open calls
};

// Threads that take seats in open calls. Never destroyed: they sleep in it until the process ends.
class Pool {
  public:
    void run(Call& call) {
        open(call);
        call.run(call.context, 0);
        close(call);
        const auto left = [&call] { return call.running == 0; };
        if (left() || (spins_ && spin_until(left))) return;
        ++waiting_;
        std::unique_lock<std::mutex> lock(mutex_);
        wait(left_, lock, left);
        --waiting_;
    }

  private:
    void open(Call& call) {
        int asleep = 0;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            grow(call.seats);
            Call** end = &first_;
            while (*end) end = &(*end)->later;
            *end = &call;
            asleep = std::min(sleeping_, call.seats - (idle_ - sleeping_));
        }
        seats_ += call.seats;  // not before the mutex is free, which those who see it want
        for (; asleep > 0; --asleep) opened_.notify_one();
    }

    // Takes the seats back that nobody took.
    void close(Call& call) {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (Call** at = &first_; *at; at = &(*at)->later) {
            if (*at != &call) continue;
            *at = call.later;
            break;
        }
        seats_ -= call.seats - call.taken;
    }

    // Several callers share as many threads as there are processors, unless one of them asks for more.
    void grow(int seats) {
        static const int processors = static_cast<int>(std::thread::hardware_concurrency());
        for (; idle_ < seats && threads_ < std::max(processors - 1, seats); ++idle_, ++threads_) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::exception&) {
                break;  // no thread or memory available (system_error, bad_alloc): those at work do it all
            }
        }
        spins_ = threads_ < processors;
    }

    [[noreturn]] void serve() {
        for (;;) {
            if (spins_) spin_until([this] { return seats_ > 0; });
            Call* call;
            int worker;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                ++sleeping_;
                wait(opened_, lock, [this] { return first_ != nullptr; });
                --sleeping_;
                --idle_;
                --seats_;
                call = first_;
                worker = ++call->taken;
                ++call->running;
                if (call->taken == call->seats) first_ = call->later;
            }
            call->run(call->context, worker);
            ++idle_;
            if (--call->running == 0 && waiting_ > 0) {
                {
                    const std::lock_guard<std::mutex> lock(mutex_);
                }  // a caller that saw the old number is asleep by now
                left_.notify_all();
            }
        }
    }

    std::mutex mutex_;
    std::condition_variable opened_, left_;
    Call* first_ = nullptr;           // of the calls with free seats
    int threads_ = 0, sleeping_ = 0;  // all, and those that wait for `opened_`
    std::atomic<int> idle_{0};        // those in no call
    std::atomic<int> seats_{0};       // free ones; late by a moment
    std::atomic<int> waiting_{0};     // callers that wait for `left_`
    std::atomic<bool> spins_{false};  // whether no thread could keep another one from its processor by spinning
};

std::atomic<Pool*> current{nullptr};
std::atomic<bool> in_child{false};

}  // namespace

// The child has none of the threads, and the mutex as it was: it begins with a new pool, and leaves OpenMP's alone, which would wait for
// threads that are not there.
void forked() {
    current = nullptr;
    in_child = true;
}

namespace {

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, forked);
#endif

Pool& pool() {
    if (Pool* found = current) return *found;
    Pool *none = nullptr, *made = new Pool;
    if (current.compare_exchange_strong(none, made)) return *made;
    delete made;
    return *none;
}

// The entry to OpenMP's threads of gcc's and llvm's runtimes, if this process has loaded one for all, as torch does; otherwise null.
using Team = void (*)(void (*member)(void*), void* data, unsigned threads, unsigned flags);

Team openmp() {
#if (defined(__unix__) || defined(__APPLE__)) && !defined(__SANITIZE_THREAD__)  // whose detector cannot see OpenMP's locks
    static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return in_child ? nullptr : found;
#else
    return nullptr;
#endif
}

}  // namespace

// Torch's own threads wait for work by spinning, for milliseconds after each of its operations. Where they could be had but others were
// used, those would have to share the processors with them: beside torch, small calls took half as long again.
void run_together(int threads, void (*run)(const void*, int), const void* context) {
    if (const Team team = openmp()) {
        struct Seats {
            void (*run)(const void*, int);
            const void* context;
            int threads;
            std::atomic<int> taken{0};
        } seats{run, context, threads};
        const auto member = [](void* data) {
            Seats& seats = *static_cast<Seats*>(data);
            const int worker = seats.taken++;
            if (worker < seats.threads) seats.run(seats.context, worker);
        };
        team(member, &seats, 0, 0);  // 0: as many as torch has, since a smaller team would end the threads that are left over
        return;
    }
    Call call{run, context, threads - 1};
    pool().run(call);
}

}  // namespace ttcfast
