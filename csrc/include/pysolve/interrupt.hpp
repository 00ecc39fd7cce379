// Long work asks now and then whether it should end.
#pragma once

#include <chrono>
#include <functional>

namespace pysolve {

// As long as it lives, `check_interrupt` on its thread calls `check`, at most every 20 ms; `check` may throw.
class Interruptible {
  public:
    explicit Interruptible(std::function<void()> check);
    ~Interruptible();
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

  private:
    friend void check_interrupt();
    std::function<void()> check_;
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
    Interruptible* outer_;
};

// For between two pieces of work that take far less than a second each; next to nothing where nobody listens.
void check_interrupt();

}  // namespace pysolve
