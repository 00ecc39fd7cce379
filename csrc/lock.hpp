// The interpreter's lock, for threads that may still compute when the interpreter ends, and its signals.
#pragma once

#include <pybind11/pybind11.h>

namespace pysolve {

// What asks for the lock while the interpreter ends has its thread unwound, through frames that must not be:
// such a thread waits for the end of the process instead.
void before_lock();
void after_lock();

// Without the lock.
class Unlocked {
  public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() {
        before_lock();
        PyEval_RestoreThread(state_);
        after_lock();
    }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

  private:
    PyThreadState* state_;
};

// With the lock again, inside of the other.
class Locked {
  public:
    Locked() {
        before_lock();
        state_ = PyGILState_Ensure();
        after_lock();
    }
    ~Locked() { PyGILState_Release(state_); }
    Locked(const Locked&) = delete;
    Locked& operator=(const Locked&) = delete;

  private:
    PyGILState_STATE state_;
};

// For `Interruptible`, without the lock held.
inline void check_signals() {
    const Locked lock;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

void register_lock();

}  // namespace pysolve
