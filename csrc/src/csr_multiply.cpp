// Rows of the sparse matrix, tiles of the dense one, and who does what of them.
#include <algorithm>
#include <iterator>

#include "csr_tiles.hpp"
#include "pysolve/interrupt.hpp"

namespace pysolve {

namespace {

// Bytes of a packed tile that stay in the first and in the second cache.
constexpr Index first_cache = 32768, second_cache = 524288;
// Rows whose sums are kept at hand while all blocks pass by, and bytes of their entries, which pass the
// second cache once for all blocks.
constexpr Index most_rows = 256, fewest_rows = 8, entry_bytes = 262144;
// Multiplications below which a thread is not worth waking.
constexpr double work_per_thread = 1 << 16;

// Blocks first … last − 1, which lie in one span.
template <class T>
Part<T> part(const Sparse<T>& A, Index first, Index last) {
    return {A.values.data(), A.indices.data(), A.bound(first), A.bound(last)};
}

// Where the blocks from b on end that fit the cache together, and lie in one span.
template <class T>
Index reach(const Sparse<T>& A, Index b, Index feature_bytes) {
    // A narrow tile loads less than the entries themselves do, which are quickest read as they lie.
    const bool narrow = feature_bytes <= (A.masks.empty() ? 128 : 64);
    const Index fitting = std::max(A.block, (narrow ? second_cache : first_cache) / feature_bytes);
    const Index span_end = A.origin(b) + column_span;
    const Index column = std::min(A.start(b) + fitting, span_end);
    if (A.present.empty()) return std::clamp(column / A.block, b + 1, A.blocks());
    Index next = b + 1;
    while (next < A.blocks() && A.start(next) + A.block <= column) ++next;
    return next;
}

template <class T>
struct Epilogue {
    const T* bias;
    bool relu;
};

// All blocks of some rows for one tile.
template <class T>
void multiply_rows(const Sparse<T>& A, const T* packed, Index width, Index first, Index last, T* out,
                   Index stride, Epilogue<T> end) {
    for (Index b = 0, next; b < A.blocks(); b = next) {
        next = reach(A, b, width * Index{sizeof(T)});
        kernels<T>().rows(part(A, b, next), first, last, width, packed + A.origin(b) * width, out, stride,
                          end.bias, b > 0, end.relu && next == A.blocks());
    }
}

template <class T>
Index rows_at_once(const Sparse<T>& A) {
    const Index row_bytes = A.entries * Index{sizeof(T) + 2} / A.rows + 1;
    return std::clamp(entry_bytes / row_bytes, fewest_rows, most_rows);
}

template <class T>
void multiply_tile(const Sparse<T>& A, const T* packed, const Tile& tile, Index first, Index last, Dense<T> Y,
                   Epilogue<T> end) {
    static thread_local Scratch<T> scratch;
    const bool direct = Y.layout == Layout::feature && tile.count == tile.width;
    const Index step = rows_at_once(A);
    T* sums = direct ? nullptr : scratch.get(step * tile.width);
    for (Index r = first; r < last; r += step) {
        const Index stop = std::min(last, r + step);
        T* to = Y.layout == Layout::feature ? Y.data + r * Y.stride + tile.first
                                            : Y.data + tile.first * Y.stride + r;
        if (direct) {
            multiply_rows(A, packed, tile.width, r, stop, to, Y.stride, end);
            continue;
        }
        multiply_rows(A, packed, tile.width, r, stop, sums, tile.width, end);
        if (Y.layout == Layout::batch)
            kernels<T>().transpose(sums, tile.width, to, Y.stride, stop - r, tile.count);
        else
            for (Index i = r; i < stop; ++i)
                std::copy_n(sums + (i - r) * tile.width, tile.count, to + (i - r) * Y.stride);
    }
}

// Pieces of the work for each thread: whoever comes late, or is slow, leaves some to the others.
constexpr Index pieces_per_thread = 2;

// Where to cut the rows so that all pieces have as many entries; at multiples of 16 rows, a cache line of
// results.
template <class T>
std::vector<Index> cuts_of(const Sparse<T>& A, int threads) {
    const Index pieces = threads == 1 ? 1 : pieces_per_thread * threads;
    std::vector<Index> cuts{0};
    const Index* starts = A.bound(0);
    for (Index i = 1; i < pieces; ++i) {
        const Index entry = A.entries * i / pieces;
        const Index row = std::lower_bound(starts, starts + A.rows, entry) - starts;
        cuts.push_back(std::max(cuts.back(), row / 16 * 16));
    }
    cuts.push_back(A.rows);
    return cuts;
}

// One sample's features side by side, and zeros up to a whole word of a mask.
template <class T>
const T* gathered(const Sparse<T>& A, Dense<const T> X, T* copy) {
    const Index step = X.layout == Layout::feature ? X.stride : 1;
    for (Index i = 0; i < A.columns; ++i) copy[i] = X.data[i * step];
    std::fill(copy + A.columns, copy + 64 * A.words(), T(0));
    return copy;
}

template <class T>
void dots(const Sparse<T>& A, const T* x, Index first, Index last, T* out, Epilogue<T> end) {
    for (Index b = 0, next; b < A.blocks(); b = next) {
        next = reach(A, b, sizeof(T));
        kernels<T>().dots(part(A, b, next), first, last, x + A.origin(b), out, end.bias, b > 0,
                          end.relu && next == A.blocks());
    }
}

template <class T>
void multiply_one(const Sparse<T>& A, Dense<const T> X, Dense<T> Y, Epilogue<T> end, int threads) {
    static thread_local Scratch<T> inputs, outputs;
    const bool masked = kernels<T>().masked_dots && !A.masks.empty();
    const bool as_it_lies = !masked && (X.layout == Layout::batch || X.stride == 1);
    const T* x = as_it_lies ? X.data : gathered(A, X, inputs.get(64 * A.words()));
    const bool apart = Y.layout == Layout::feature && Y.stride != 1;
    T* y = apart ? outputs.get(A.rows) : Y.data;
    const auto cuts = cuts_of(A, threads);
    parallel(threads, std::ssize(cuts) - 1, [&](Index piece) {
        const Index first = cuts[static_cast<std::size_t>(piece)],
                    last = cuts[static_cast<std::size_t>(piece) + 1];
        if (masked)
            kernels<T>().masked_dots(A.values.data(), A.bound(0), A.masks.data(), A.words(), first, last, x,
                                     y, end.bias, end.relu);
        else
            dots(A, x, first, last, y, end);
    });
    if (apart)
        for (Index r = 0; r < A.rows; ++r) Y.data[r * Y.stride] = y[r];
}

int useful_threads(double work, int threads) {
    return static_cast<int>(
        std::clamp(work / work_per_thread, 1.0, static_cast<double>(std::max(threads, 1))));
}

}  // namespace

template <class T>
void multiply(const Sparse<T>& A, Dense<const T> X, Index batch, Dense<T> Y, const T* bias, bool relu,
              int threads) {
    if (A.rows == 0 || batch == 0) return;
    const Epilogue<T> end{bias, relu};
    threads = useful_threads(static_cast<double>(A.entries) * static_cast<double>(batch), threads);
    if (batch == 1) return multiply_one(A, X, Y, end, threads);
    const std::vector<Tile> tiles = tiles_of<T>(A.columns, batch);
    const Index count = static_cast<Index>(tiles.size()), whole = count / threads * threads;
    static thread_local Scratch<T> scratch;
    // Whole tiles as long as there is one for each thread, then the rows of what is left.
    parallel(threads, whole, [&](Index t) {
        check_interrupt();
        static thread_local Scratch<T> own;
        const Tile& tile = tiles[static_cast<std::size_t>(t)];
        const T* x = in_place(X, tile);
        if (!x) {
            T* packed = own.get(A.columns * tile.width);
            pack(X, tile, 0, A.columns, packed);
            x = packed;
        }
        multiply_tile(A, x, tile, 0, A.rows, Y, end);
    });
    const auto cuts = cuts_of(A, threads);
    for (Index t = whole; t < count; ++t) {
        check_interrupt();
        const Tile& tile = tiles[static_cast<std::size_t>(t)];
        const T* x = in_place(X, tile);
        if (!x) {
            T* packed = scratch.get(A.columns * tile.width);
            pack_all(threads, X, tile, A.columns, packed);
            x = packed;
        }
        parallel(threads, std::ssize(cuts) - 1, [&](Index piece) {
            const auto p = static_cast<std::size_t>(piece);
            multiply_tile(A, x, tile, cuts[p], cuts[p + 1], Y, end);
        });
    }
}

template <class T>
void value_gradient(const Sparse<T>& A, Dense<const T> G, Dense<const T> X, Index batch, T* gradient,
                    int threads) {
    std::fill_n(gradient, A.entries, T(0));
    threads = useful_threads(static_cast<double>(A.entries) * static_cast<double>(batch), threads);
    static thread_local Scratch<T> above, below;
    const auto cuts = cuts_of(A, threads);
    for (const Tile& tile : tiles_of<T>(A.rows + A.columns, batch)) {
        check_interrupt();
        T* g = above.get(A.rows * tile.width);
        T* x = below.get(A.columns * tile.width);
        pack_all(threads, G, tile, A.rows, g);
        pack_all(threads, X, tile, A.columns, x);
        parallel(threads, std::ssize(cuts) - 1, [&](Index piece) {
            const auto p = static_cast<std::size_t>(piece);
            for (Index b = 0; b < A.blocks(); ++b)
                kernels<T>().products(part(A, b, b + 1), cuts[p], cuts[p + 1], tile.width, g,
                                      x + A.origin(b) * tile.width, gradient);
        });
    }
}

template void multiply(const Sparse<float>&, Dense<const float>, Index, Dense<float>, const float*, bool,
                       int);
template void multiply(const Sparse<double>&, Dense<const double>, Index, Dense<double>, const double*, bool,
                       int);
template void value_gradient(const Sparse<float>&, Dense<const float>, Dense<const float>, Index, float*,
                             int);
template void value_gradient(const Sparse<double>&, Dense<const double>, Dense<const double>, Index, double*,
                             int);

}  // namespace pysolve
