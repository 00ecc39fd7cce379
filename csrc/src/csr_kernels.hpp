// What the inner loops of the sparse product do; the loops themselves are in csr_loops.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pysolve {

// A part of a sparse matrix: entries starts[r] … stops[r] of each row. One start more than there are rows can
// be read.
template <class T>
struct Part {
    const T* values;
    const std::uint16_t* indices;
    const std::ptrdiff_t *starts, *stops;
};

// A tile holds some samples of every feature, packed: x[feature * width + sample].
template <class T>
struct Kernels {
    // Widths of tiles, in bytes: powers of two from `narrowest` to `widest`.
    std::ptrdiff_t narrowest, widest;
    // out[r] = relu?(out[r] or bias[r] or 0 + Σ values · tile rows), for rows first … last − 1; out[first]
    // comes first.
    void (*rows)(const Part<T>& part, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t width,
                 const T* x, T* out, std::ptrdiff_t stride, const T* bias, bool add, bool relu);
    // The same for one sample, with out[r].
    void (*dots)(const Part<T>& part, std::ptrdiff_t first, std::ptrdiff_t last, const T* x, T* out,
                 const T* bias, bool add, bool relu);
    // The same where bits say which columns have an entry, 64 in a word; x ends with a whole word, and 64
    // bytes may be read after the last value. Null where the level has no instruction for it.
    void (*masked_dots)(const T* values, const std::ptrdiff_t* starts, const std::uint64_t* masks,
                        std::ptrdiff_t words, std::ptrdiff_t first, std::ptrdiff_t last, const T* x, T* out,
                        const T* bias, bool relu);
    // out[i] += Σ_samples g[r] · x[index of i] for the entries of rows first … last − 1.
    void (*products)(const Part<T>& part, std::ptrdiff_t first, std::ptrdiff_t last, std::ptrdiff_t width,
                     const T* g, const T* x, T* out);
    // out[j * out_stride + i] = in[i * in_stride + j], i < rows, j < columns.
    void (*transpose)(const T* in, std::ptrdiff_t in_stride, T* out, std::ptrdiff_t out_stride,
                      std::ptrdiff_t rows, std::ptrdiff_t columns);
};

extern const Kernels<float> plain_float, avx2_float, avx512_float;
extern const Kernels<double> plain_double, avx2_double, avx512_double;

// Those of the current level.
template <class T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels();
template <>
const Kernels<double>& kernels();

}  // namespace pysolve
