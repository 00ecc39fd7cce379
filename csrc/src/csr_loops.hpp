// The inner loops of the sparse product. Compiled once for each level of instructions, in files that define
// PYSOLVE_LEVEL and PYSOLVE_VECTOR_BYTES. Nothing from the standard library may be instantiated here: the
// linker could give the copy with the newer instructions to everyone.
#pragma once

#include "csr_kernels.hpp"

#define PYSOLVE_ALWAYS_INLINE __attribute__((always_inline)) inline

namespace pysolve {
namespace PYSOLVE_LEVEL {

using std::ptrdiff_t;

template <class T, int lanes>
struct Vector {
    typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

template <class V, class T>
PYSOLVE_ALWAYS_INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);  // p need not be aligned
    return v;
}

template <class V, class T>
PYSOLVE_ALWAYS_INLINE void store(T* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class V, class T>
PYSOLVE_ALWAYS_INLINE V spread(T value) {
    return value - V{};  // −0 stays −0
}

// NaN is kept.
template <class V>
PYSOLVE_ALWAYS_INLINE V clipped(V v) {
    return v < 0 ? V{} : v;
}

// Tiles of `vectors` vectors; `chains` sums run side by side, because an addition takes four cycles to
// finish.
template <class T, int lanes, int vectors>
void rows_of(const Part<T>& part, ptrdiff_t first, ptrdiff_t last, const T* x, T* out, ptrdiff_t stride,
             const T* bias, bool add, bool relu) {
    using V = typename Vector<T, lanes>::type;
    constexpr int chains = vectors >= 8 ? 1 : vectors >= 4 ? 2 : vectors == 2 ? 4 : 8;
    constexpr ptrdiff_t width = lanes * vectors;
    constexpr ptrdiff_t line_size = 64 / sizeof(T);
    for (ptrdiff_t r = first; r < last; ++r, out += stride) {
        V sums[chains][vectors];
        const V start = spread<V>(bias ? bias[r] : T(0));
#pragma GCC unroll 8
        for (int k = 0; k < vectors; ++k) sums[0][k] = add ? load<V>(out + k * lanes) : start;
#pragma GCC unroll 8
        for (int c = 1; c < chains; ++c)
#pragma GCC unroll 8
            for (int k = 0; k < vectors; ++k) sums[c][k] = V{};
        ptrdiff_t i = part.starts[r];
        const ptrdiff_t stop = part.stops[r];
        // The next row's entries: where a block ends the processor does not foresee them.
        const ptrdiff_t next = part.starts[r + 1];
#pragma GCC unroll 8
        for (int line = 0; line < 8; ++line) __builtin_prefetch(part.values + next + line * line_size);
#pragma GCC unroll 4
        for (int line = 0; line < 4; ++line) __builtin_prefetch(part.indices + next + line * 32);
        for (; i + chains <= stop; i += chains) {
#pragma GCC unroll 8
            for (int c = 0; c < chains; ++c) {
                const T* from = x + part.indices[i + c] * width;
                const V value = spread<V>(part.values[i + c]);
#pragma GCC unroll 8
                for (int k = 0; k < vectors; ++k) sums[c][k] += value * load<V>(from + k * lanes);
            }
        }
        // What is left, each to a sum of its own.
#pragma GCC unroll 8
        for (int c = 0; c + 1 < chains; ++c) {
            if (i + c >= stop) break;
            const T* from = x + part.indices[i + c] * width;
            const V value = spread<V>(part.values[i + c]);
#pragma GCC unroll 8
            for (int k = 0; k < vectors; ++k) sums[c][k] += value * load<V>(from + k * lanes);
        }
#pragma GCC unroll 8
        for (int c = 1; c < chains; ++c)
#pragma GCC unroll 8
            for (int k = 0; k < vectors; ++k) sums[0][k] += sums[c][k];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; ++k) store(out + k * lanes, relu ? clipped(sums[0][k]) : sums[0][k]);
    }
}

// Eight vectors of sums fit in the registers of every level.
constexpr int narrowest = 32, widest = 8 * PYSOLVE_VECTOR_BYTES;

// Calls body<lanes, vectors>() for tiles of `width` numbers.
template <class T, int bytes = narrowest, class Body>
PYSOLVE_ALWAYS_INLINE void with_width(ptrdiff_t width, const Body& body) {
    constexpr int numbers = bytes / sizeof(T);
    constexpr int lanes = bytes < PYSOLVE_VECTOR_BYTES ? numbers : PYSOLVE_VECTOR_BYTES / sizeof(T);
    if (width == numbers) return body.template operator()<lanes, numbers / lanes>();
    if constexpr (bytes < widest) with_width<T, 2 * bytes>(width, body);
}

template <class T>
void rows(const Part<T>& part, ptrdiff_t first, ptrdiff_t last, ptrdiff_t width, const T* x, T* out,
          ptrdiff_t stride, const T* bias, bool add, bool relu) {
    with_width<T>(width, [&]<int lanes, int vectors>() {
        rows_of<T, lanes, vectors>(part, first, last, x, out, stride, bias, add, relu);
    });
}

// Four or two numbers from anywhere, side by side. One product after the other takes half as long again, and
// so does the instruction that gathers.
template <class V, class T>
PYSOLVE_ALWAYS_INLINE V gathered(const T* x, const std::uint16_t* i) {
    if constexpr (sizeof(V) == 4 * sizeof(T))
        return V{x[i[0]], x[i[1]], x[i[2]], x[i[3]]};
    else
        return V{x[i[0]], x[i[1]]};
}

template <class T>
void dots(const Part<T>& part, ptrdiff_t first, ptrdiff_t last, const T* x, T* out, const T* bias, bool add,
          bool relu) {
    constexpr int lanes = 16 / sizeof(T), chains = 4;
    using V = typename Vector<T, lanes>::type;
    for (ptrdiff_t r = first; r < last; ++r) {
        V sums[chains] = {};
        ptrdiff_t i = part.starts[r];
        const ptrdiff_t stop = part.stops[r];
        const auto step = [&](int c, ptrdiff_t at) {
            sums[c] += gathered<V>(x, part.indices + at) * load<V>(part.values + at);
        };
        for (; i + chains * lanes <= stop; i += chains * lanes)
#pragma GCC unroll 4
            for (int c = 0; c < chains; ++c) step(c, i + c * lanes);
#pragma GCC unroll 4
        for (int c = 0; c + 1 < chains; ++c) {
            if (i + lanes > stop) break;
            step(c, i);
            i += lanes;
        }
        T total = add ? out[r] : bias ? bias[r] : T(0);
        for (; i < stop; ++i) total += part.values[i] * x[part.indices[i]];
        const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 4
        for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
        out[r] = relu && total < 0 ? T(0) : total;
    }
}

template <class T, int lanes, int vectors>
void products_of(const Part<T>& part, ptrdiff_t first, ptrdiff_t last, const T* g, const T* x, T* out) {
    using V = typename Vector<T, lanes>::type;
    constexpr ptrdiff_t width = lanes * vectors;
    for (ptrdiff_t r = first; r < last; ++r) {
        V mine[vectors];
#pragma GCC unroll 8
        for (int k = 0; k < vectors; ++k) mine[k] = load<V>(g + r * width + k * lanes);
        for (ptrdiff_t i = part.starts[r]; i < part.stops[r]; ++i) {
            const T* from = x + part.indices[i] * width;
            V sum{};
#pragma GCC unroll 8
            for (int k = 0; k < vectors; ++k) sum += mine[k] * load<V>(from + k * lanes);
            T total = 0;
#pragma GCC unroll 16
            for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
            out[i] += total;
        }
    }
}

template <class T>
void products(const Part<T>& part, ptrdiff_t first, ptrdiff_t last, ptrdiff_t width, const T* g, const T* x,
              T* out) {
    with_width<T>(width, [&]<int lanes, int vectors>() {
        products_of<T, lanes, vectors>(part, first, last, g, x, out);
    });
}

// Eight rows of eight numbers, by exchanges in registers.
template <class T>
PYSOLVE_ALWAYS_INLINE void transpose_eight(const T* in, ptrdiff_t in_stride, T* out, ptrdiff_t out_stride) {
    using V = typename Vector<T, 8>::type;
    V a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = load<V>(in + i * in_stride);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 8
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = __builtin_shufflevector(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            a[i + 2 * j + 1] = __builtin_shufflevector(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
        store(out + i * out_stride, __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store(out + (i + 4) * out_stride,
              __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}

template <class T>
void transpose(const T* in, ptrdiff_t in_stride, T* out, ptrdiff_t out_stride, ptrdiff_t rows,
               ptrdiff_t columns) {
    const ptrdiff_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    const auto block = [&](ptrdiff_t i, ptrdiff_t j) {
        transpose_eight(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    };
    // At most eight far-apart rows at a time: 64 of them, 4096 bytes apart, would share one set of the cache.
    if (in_stride >= out_stride) {
        for (ptrdiff_t i = 0; i < whole_rows; i += 8)
            for (ptrdiff_t j = 0; j < whole_columns; j += 8) block(i, j);
    } else {
        for (ptrdiff_t j = 0; j < whole_columns; j += 8)
            for (ptrdiff_t i = 0; i < whole_rows; i += 8) block(i, j);
    }
    for (ptrdiff_t i = 0; i < rows; ++i)
        for (ptrdiff_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
            out[j * out_stride + i] = in[i * in_stride + j];
}

template <class T>
constexpr Kernels<T> table{narrowest, widest, rows<T>, dots<T>, nullptr, products<T>, transpose<T>};

}  // namespace PYSOLVE_LEVEL
}  // namespace pysolve
