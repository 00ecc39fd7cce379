#include "pysolve/interrupt.hpp"

#include <utility>

namespace pysolve {
namespace {

thread_local Interruptible* listener = nullptr;

}  // namespace

Interruptible::Interruptible(std::function<void()> check)
    : check_(std::move(check)), outer_(std::exchange(listener, this)) {}

Interruptible::~Interruptible() {
    listener = outer_;
}

void check_interrupt() {
    if (!listener) return;
    const auto now = std::chrono::steady_clock::now();
    if (now - listener->last_ < std::chrono::milliseconds(20)) return;
    listener->last_ = now;
    listener->check_();
}

}  // namespace pysolve
