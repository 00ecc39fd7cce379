// Sums that vectorise, and functions compiled once for each generation of vector instructions.
#pragma once

#include <cstddef>

// The loader picks the clone that fits the processor, before a sanitizer of threads is ready for its
// question. Elsewhere the one plain version serves, and where lines are counted: of several clones one runs.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(__SANITIZE_THREAD__) && !defined(PYSOLVE_ONE_CLONE)
#define PYSOLVE_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define PYSOLVE_INLINE __attribute__((always_inline)) inline  // a call would leave the clone
#else
#define PYSOLVE_CLONES
#define PYSOLVE_INLINE inline
#endif

namespace pysolve {

// Σ_i term(i), i < n. Several running sums: the compiler may not reorder one, and a single chain of additions
// would wait for each to finish.
template <class Term>
PYSOLVE_INLINE double sum(std::size_t n, Term term) {
    constexpr std::size_t lanes = 16;
    double partial[lanes] = {};
    const std::size_t whole = n - n % lanes;
    for (std::size_t i = 0; i < whole; i += lanes)
        for (std::size_t j = 0; j < lanes; ++j) partial[j] += term(i + j);
    for (std::size_t width = lanes / 2; width > 0; width /= 2)
        for (std::size_t j = 0; j < width; ++j) partial[j] += partial[j + width];
    double total = partial[0];
    for (std::size_t i = whole; i < n; ++i) total += term(i);
    return total;
}

}  // namespace pysolve
