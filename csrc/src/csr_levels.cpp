// Which instructions this processor has, and the kernels that use them.
#include <atomic>

#include "csr_kernels.hpp"
#include "pysolve/csr.hpp"

namespace pysolve {

namespace {

Level best_level() {
#if defined(__x86_64__) && !defined(_WIN32)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("popcnt"))
        return Level::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::avx2;
#endif
    return Level::plain;
}

std::atomic<Level> current{best_level()};

}  // namespace

Level level() {
    return current;
}

bool supported(Level level) {
    return level <= best_level();
}

void set_level(Level level) {
    current = level;
}

template <>
const Kernels<float>& kernels() {
#if defined(__x86_64__) && !defined(_WIN32)
    if (current == Level::avx512) return avx512_float;
    if (current == Level::avx2) return avx2_float;
#endif
    return plain_float;
}

template <>
const Kernels<double>& kernels() {
#if defined(__x86_64__) && !defined(_WIN32)
    if (current == Level::avx512) return avx512_double;
    if (current == Level::avx2) return avx2_double;
#endif
    return plain_double;
}

}  // namespace pysolve
