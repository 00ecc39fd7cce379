// Ctrl-C in compiled code.
#pragma once

#include <pybind11/pybind11.h>

// For `Interruptible`, without the lock held.
inline void check_signals() {
    const pybind11::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}
