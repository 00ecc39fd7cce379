// Parallel loops over a few threads of our own, which sleep between loops.
#pragma once

#include <cstdint>
#include <functional>

namespace pysolve {

// Most threads of a loop, the caller's own included; at first as many as the process may run on.
int num_threads();
void set_num_threads(int threads);

// job(i) for i = 0 … parts − 1, in no order, on up to `threads` threads; the first exception is thrown again
// here. A loop inside a loop, or one that begins while another caller's is running, runs on its caller's
// thread alone. After a fork the child begins with no threads.
void parallel(int threads, std::int64_t parts, const std::function<void(std::int64_t)>& job);

}  // namespace pysolve
