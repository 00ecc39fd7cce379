// Sparse matrix (compressed rows) × dense matrix, prepared once and multiplied many times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pysolve/blas.hpp"

namespace pysolve {

// Which instructions the kernels may use: at first the best that this processor has.
enum class Level { plain, avx2, avx512 };
Level level();
bool supported(Level level);
void set_level(Level level);

// A matrix as others hand it over: row r has the values[i] at columns indices[i], starts[r] ≤ i <
// starts[r+1], in any order; values at one place add up.
template <class T, class I>
struct CsrView {
    Index rows, columns;
    const I* starts;
    const I* indices;
    const T* values;
};

// 16-bit indices tell so many columns apart.
constexpr Index column_span = 65536;

// Entries row by row, in each by columns, every place once. Columns are cut into blocks, so that a block of a
// packed tile of the dense matrix stays in a near cache: row r of block b has the entries from bound(b)[r] to
// bound(b + 1)[r]. An index counts from the start of its span, which no block crosses.
template <class T>
struct Sparse {
    Index rows = 0, columns = 0, entries = 0, block = 1;
    std::vector<Index> bounds;
    // Which blocks have entries, where few of them do; else empty, and all are there.
    std::vector<Index> present;
    std::vector<std::uint16_t> indices;
    // And 64 bytes that may be read.
    std::vector<T> values;
    // Of a matrix that is not very sparse: a bit for every place, rows of whole words.
    std::vector<std::uint64_t> masks;

    Index all_blocks() const { return std::max<Index>(1, (columns + block - 1) / block); }
    Index blocks() const { return present.empty() ? all_blocks() : static_cast<Index>(present.size()); }
    // The first column of block b.
    Index start(Index b) const {
        return (present.empty() ? b : present[static_cast<std::size_t>(b)]) * block;
    }
    Index words() const { return (columns + 63) / 64; }
    // Where block b's entries begin, row by row; of b = blocks(), where the rows end.
    const Index* bound(Index b) const { return bounds.data() + b * rows; }
    // What the indices of block b count from.
    Index origin(Index b) const { return start(b) / column_span * column_span; }
};

// Throws std::invalid_argument, before anything is read through an index, unless the starts ascend from 0 or
// later to `entries` at most, all indices lie within the columns, and these are fewer than 2³¹;
// std::bad_alloc, before the memory is taken, where there is not so much.
// block: 0 for the width that suits the density.
template <class T, class I>
Sparse<T> prepare(const CsrView<T, I>& csr, Index entries, Index block = 0);

// How the numbers of a dense matrix lie: feature i of sample j is at i * stride + j, or at j * stride + i.
enum class Layout { feature, batch };

template <class T>
struct Dense {
    T* data;
    Index stride;
    Layout layout;
};

// Y = A X + bias for `batch` samples, negative numbers replaced by 0 with `relu`. bias may be null.
template <class T>
void multiply(const Sparse<T>& A, Dense<const T> X, Index batch, Dense<T> Y, const T* bias, bool relu,
              int threads);

// gradient[i] = Σ_samples G_r X_c for each entry i, at (r, c): of a loss by the values, where G is its
// gradient by Y.
template <class T>
void value_gradient(const Sparse<T>& A, Dense<const T> G, Dense<const T> X, Index batch, T* gradient,
                    int threads);

}  // namespace pysolve
