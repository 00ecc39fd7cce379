#define PYSOLVE_LEVEL avx512_level
#define PYSOLVE_VECTOR_BYTES 64
#include <immintrin.h>

#include "csr_loops.hpp"

namespace pysolve {
namespace avx512_level {

PYSOLVE_ALWAYS_INLINE __m512 expanded(std::uint64_t mask, __m512 v) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), v);
}

PYSOLVE_ALWAYS_INLINE __m512d expanded(std::uint64_t mask, __m512d v) {
    return _mm512_maskz_expand_pd(static_cast<__mmask8>(mask), v);
}

// a · b + c at the columns of a mask, c at the others, whatever b is there.
PYSOLVE_ALWAYS_INLINE __m512 multiplied(std::uint64_t mask, __m512 a, __m512 b, __m512 c) {
    return _mm512_mask3_fmadd_ps(a, b, c, static_cast<__mmask16>(mask));
}

PYSOLVE_ALWAYS_INLINE __m512d multiplied(std::uint64_t mask, __m512d a, __m512d b, __m512d c) {
    return _mm512_mask3_fmadd_pd(a, b, c, static_cast<__mmask8>(mask));
}

// sums += values · x for four vectors of columns, whose masks are the low bits of `word`.
template <class V, class T>
PYSOLVE_ALWAYS_INLINE void add_four(std::uint64_t word, const T* values, const T* x, V (&sums)[4]) {
    constexpr int lanes = 64 / sizeof(T);
    V v[4];
    // Each place is counted from the start: one from the other they would be a chain.
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
        v[k] = load<V>(values + __builtin_popcountll(word & ((std::uint64_t{1} << (lanes * k)) - 1)));
    // Expanding straight from memory is microcode on Zen; in four registers, because it waits for its
    // target's old content.
    asm("" : "+v"(v[0]), "+v"(v[1]), "+v"(v[2]), "+v"(v[3]));
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) v[k] = expanded(word >> (lanes * k), v[k]);
    asm("" : "+v"(v[0]), "+v"(v[1]), "+v"(v[2]), "+v"(v[3]));
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
        sums[k] = multiplied(word >> (lanes * k), v[k], load<V>(x + lanes * k), sums[k]);
}

template <class T>
void masked_dots(const T* values, const ptrdiff_t* starts, const std::uint64_t* masks, ptrdiff_t words,
                 ptrdiff_t first, ptrdiff_t last, const T* x, T* out, const T* bias, bool relu) {
    constexpr int lanes = 64 / sizeof(T), bits = 4 * lanes;
    using V = typename Vector<T, lanes>::type;
    for (ptrdiff_t r = first; r < last; ++r) {
        const T* next = values + starts[r];
        V sums[4] = {};
        for (ptrdiff_t w = 0; w < words; ++w) {
#pragma GCC unroll 2
            for (int start = 0; start < 64; start += bits) {
                const std::uint64_t word = masks[r * words + w] << (64 - bits - start) >> (64 - bits);
                add_four(word, next, x + w * 64 + start, sums);
                next += __builtin_popcountll(word);
            }
        }
        const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        T total = bias ? bias[r] : T(0);
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
        out[r] = relu && total < 0 ? T(0) : total;
    }
}

template <class T>
constexpr Kernels<T> with_masks{narrowest,      widest,      rows<T>,     dots<T>,
                                masked_dots<T>, products<T>, transpose<T>};

}  // namespace avx512_level

const Kernels<float> avx512_float = avx512_level::with_masks<float>;
const Kernels<double> avx512_double = avx512_level::with_masks<double>;

}  // namespace pysolve
