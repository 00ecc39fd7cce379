#include "pysolve/threads.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace pysolve {

namespace {

// Rounds of waiting before a thread goes to sleep, some 200 µs: waking one takes up to 100 on a virtual
// machine, where an idle processor is given back to the host. A thread that spins on takes a core from other
// pools.
constexpr int spins = 8000;

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Loop {
    const std::function<void(std::int64_t)>& job;
    std::int64_t parts;
    std::atomic<std::int64_t> next{0};
    std::mutex failing;
    std::exception_ptr failure;

    Loop(const std::function<void(std::int64_t)>& job, std::int64_t parts) : job(job), parts(parts) {}

    // Takes part after part until none is left, or one has failed.
    void work() {
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < parts;) {
            try {
                job(i);
            } catch (...) {
                const std::lock_guard guard(failing);
                if (!failure) failure = std::current_exception();
                next = parts;
            }
        }
    }
};

class Pool {
  public:
    // False if another loop is running.
    bool run(int threads, Loop& loop) {
        const std::unique_lock caller(busy_, std::try_to_lock);
        if (!caller) return false;
        {
            const std::lock_guard guard(mutex_);
            while (static_cast<int>(helpers_.size()) < threads - 1)
                helpers_.emplace_back(&Pool::serve, this, static_cast<int>(helpers_.size()),
                                      generation_.load());
            loop_ = &loop;
            invited_ = threads - 1;
            generation_.fetch_add(1, std::memory_order_release);
        }
        news_.notify_all();
        loop.work();
        {
            // Who has not come by now need not: a helper may be waiting for a busy processor.
            const std::lock_guard guard(mutex_);
            loop_ = nullptr;
        }
        wait(done_, [&] { return working_.load(std::memory_order_acquire) == 0; });
        return true;
    }

  private:
    template <class Ready>
    void wait(std::condition_variable& signal, const Ready& ready) {
        for (int i = 0; i < spins; ++i) {
            if (ready()) return;
            pause();
        }
        std::unique_lock lock(mutex_);
        signal.wait(lock, ready);
    }

    [[noreturn]] void serve(int number, std::uint64_t seen) {
        for (;;) {
            wait(news_, [&] { return generation_.load(std::memory_order_acquire) != seen; });
            Loop* loop = nullptr;
            {
                // Together, or a late helper could serve one loop twice, or one that is over.
                const std::lock_guard guard(mutex_);
                seen = generation_.load(std::memory_order_relaxed);
                if (number < invited_) loop = loop_;
                if (loop) working_.fetch_add(1, std::memory_order_relaxed);
            }
            if (!loop) continue;
            loop->work();
            const std::lock_guard guard(mutex_);
            if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.notify_one();
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable news_, done_;
    std::vector<std::thread> helpers_;
    Loop* loop_ = nullptr;
    int invited_ = 0;
    std::atomic<std::uint64_t> generation_{0};
    std::atomic<int> working_{0};
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, and gets a new
// pool.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        current = new Pool;
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { current = new Pool; });
#endif
    });
    return *current;
}

thread_local bool inside = false;

int processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

std::atomic<int> limit{processors()};

}  // namespace

int num_threads() {
    return limit;
}

void set_num_threads(int threads) {
    limit = threads;
}

void parallel(int threads, std::int64_t parts, const std::function<void(std::int64_t)>& job) {
    Loop loop(job, parts);
    threads = static_cast<int>(std::min<std::int64_t>(threads, parts));
    const bool nested = std::exchange(inside, true);
    if (nested || threads <= 1 || !pool().run(threads, loop)) loop.work();
    inside = nested;
    if (loop.failure) std::rethrow_exception(loop.failure);
}

}  // namespace pysolve
