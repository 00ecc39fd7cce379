// When the interpreter ends, nobody asks for its lock any more.
#include <atomic>
#include <chrono>
#include <thread>

#include "lock.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace py = pybind11;

namespace pysolve {

namespace {

std::atomic<bool> ending{false};
std::atomic<std::thread::id> ender{};
// Threads that wait for the lock.
std::atomic<int> asking{0};

}  // namespace

void before_lock() {
    asking.fetch_add(1);
    if (!ending || ender.load() == std::this_thread::get_id()) return;
    asking.fetch_sub(1);
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

void after_lock() {
    asking.fetch_sub(1);
}

void register_lock() {
#if defined(__unix__) || defined(__APPLE__)
    // Those of the parent's other threads that were asking do not exist in the child.
    pthread_atfork(nullptr, nullptr, [] { asking = 0; });
#endif
    py::module_::import("atexit").attr("register")(py::cpp_function([] {
        ender = std::this_thread::get_id();
        ending = true;
        // Those that ask already get the lock before the interpreter begins to end.
        PyThreadState* state = PyEval_SaveThread();
        while (asking > 0) std::this_thread::yield();
        PyEval_RestoreThread(state);
    }));
}

}  // namespace pysolve
