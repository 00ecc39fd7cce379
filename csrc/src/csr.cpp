#include "pysolve/csr.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "pysolve/interrupt.hpp"

namespace pysolve {

namespace {

// A block's row should hold so many entries: its sums are loaded and stored once for all of them.
constexpr double entries_wanted = 20;
constexpr Index narrowest_block = 128;
// Above it a bit for every place costs one sample less time than an index for every entry.
constexpr double masked_density = 0.3;

template <class T, class I>
void check(const CsrView<T, I>& csr, Index entries) {
    const auto wrong = [](const std::string& what) { throw std::invalid_argument(what); };
    if (csr.rows < 0 || csr.columns < 0) wrong("a matrix cannot have a negative number of rows or columns");
    if (csr.columns > std::numeric_limits<std::int32_t>::max())
        wrong("a matrix cannot have more than 2147483647 columns, got " + std::to_string(csr.columns));
    if (csr.starts[0] < 0) wrong("indptr must begin at 0 or later, got " + std::to_string(csr.starts[0]));
    for (Index r = 0; r < csr.rows; ++r)
        if (csr.starts[r + 1] < csr.starts[r])
            wrong("indptr decreases from " + std::to_string(csr.starts[r]) + " to " +
                  std::to_string(csr.starts[r + 1]) + " after row " + std::to_string(r));
    if (csr.starts[csr.rows] > entries)
        wrong("indptr ends at " + std::to_string(csr.starts[csr.rows]) + " but there are only " +
              std::to_string(entries) + " indices and values");
    for (Index i = csr.starts[0]; i < csr.starts[csr.rows]; ++i)
        if (csr.indices[i] < 0 || csr.indices[i] >= csr.columns)
            wrong("indices must lie within 0 and " + std::to_string(csr.columns - 1) + ", got " +
                  std::to_string(csr.indices[i]) + " at position " + std::to_string(i));
}

// Entries of one row in order, those at one place added up.
template <class T, class I>
void add_row(const CsrView<T, I>& csr, Index row, std::vector<std::pair<Index, T>>& sorted, Sparse<T>& A,
             std::vector<Index>& columns) {
    sorted.clear();
    bool ordered = true;
    for (Index i = csr.starts[row]; i < csr.starts[row + 1]; ++i) {
        ordered = ordered && (sorted.empty() || sorted.back().first < Index(csr.indices[i]));
        sorted.emplace_back(csr.indices[i], csr.values[i]);
    }
    if (!ordered)
        std::stable_sort(sorted.begin(), sorted.end(),
                         [](const auto& a, const auto& b) { return a.first < b.first; });
    const std::size_t before = columns.size();
    for (const auto& [column, value] : sorted) {
        if (columns.size() > before && columns.back() == column) {
            A.values.back() += value;
        } else {
            columns.push_back(column);
            A.values.push_back(value);
        }
    }
}

// A power of two, so that no block crosses a span.
Index block_for(Index columns, double density) {
    Index block = narrowest_block;
    while (block < column_span && static_cast<double>(block) * density < entries_wanted) block *= 2;
    return std::max<Index>(1, std::min(block, columns));
}

// Blocks with entries, ascending.
std::vector<Index> blocks_of(const std::vector<Index>& columns, Index block) {
    std::vector<Index> found;
    found.reserve(columns.size() + 1);
    for (Index column : columns) found.push_back(column / block);
    if (found.empty()) found.push_back(0);
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    return found;
}

struct TooLarge : std::bad_alloc {
    std::string text;
    explicit TooLarge(std::string text_) : text(std::move(text_)) {}
    const char* what() const noexcept override { return text.c_str(); }
};

// Bytes of memory that are free; as many as there can be where the system does not tell.
double free_memory() {
    std::ifstream file("/proc/meminfo");
    std::string word;
    while (file >> word)
        if (double kib = 0; word == "MemAvailable:" && file >> kib) return kib * 1024;
    return std::numeric_limits<double>::max();
}

template <class T>
void check_memory(const Sparse<T>& A) {
    const double bytes = static_cast<double>(A.blocks() + 1) * static_cast<double>(A.rows) * sizeof(Index);
    // Small amounts are not worth a look at the system.
    if (bytes < 1 << 28 || bytes < free_memory()) return;
    const auto millions = [](double value) { return std::to_string(static_cast<Index>(value / 1e6)); };
    throw TooLarge("a matrix of " + std::to_string(A.rows) + " x " + std::to_string(A.columns) + " with " +
                   std::to_string(A.entries) + " entries in " + std::to_string(A.blocks()) +
                   " blocks of columns takes " + millions(bytes) +
                   " MB for where its rows begin there, but " + millions(free_memory()) + " MB are free");
}

template <class T>
std::vector<std::uint64_t> masks_of(const Sparse<T>& A, const std::vector<Index>& columns) {
    std::vector<std::uint64_t> masks(static_cast<std::size_t>(A.rows * A.words()));
    for (Index r = 0; r < A.rows; ++r)
        for (Index i = A.bound(0)[r]; i < A.bound(A.blocks())[r]; ++i) {
            const Index column = columns[static_cast<std::size_t>(i)];
            masks[static_cast<std::size_t>(r * A.words() + column / 64)] |= std::uint64_t{1} << (column % 64);
        }
    return masks;
}

}  // namespace

template <class T, class I>
Sparse<T> prepare(const CsrView<T, I>& csr, Index entries, Index block) {
    check(csr, entries);
    Sparse<T> A;
    A.rows = csr.rows;
    A.columns = csr.columns;
    std::vector<Index> columns, starts{0};
    std::vector<std::pair<Index, T>> sorted;
    for (Index r = 0; r < csr.rows; ++r) {
        check_interrupt();
        add_row(csr, r, sorted, A, columns);
        starts.push_back(static_cast<Index>(A.values.size()));
    }
    A.entries = starts.back();
    A.values.resize(A.values.size() + 64 / sizeof(T));
    const double density = static_cast<double>(A.entries) /
                           std::max(1.0, static_cast<double>(A.rows) * static_cast<double>(A.columns));
    A.block = block ? block : block_for(A.columns, density);
    // Bounds of all blocks would take more than the entries.
    if (A.all_blocks() > 4 * A.entries / std::max<Index>(1, A.rows) + 4)
        A.present = blocks_of(columns, A.block);
    check_memory(A);
    A.bounds.assign(static_cast<std::size_t>((A.blocks() + 1) * A.rows), 0);
    for (Index r = 0; r < A.rows; ++r) {
        check_interrupt();
        Index i = starts[static_cast<std::size_t>(r)];
        const Index stop = starts[static_cast<std::size_t>(r) + 1];
        for (Index b = 0; b <= A.blocks(); ++b) {
            const Index until = b < A.blocks() ? A.start(b) : A.columns;
            while (i < stop && columns[static_cast<std::size_t>(i)] < until) ++i;
            A.bounds[static_cast<std::size_t>(b * A.rows + r)] = i;
        }
    }
    A.indices.reserve(columns.size());
    for (Index column : columns) A.indices.push_back(static_cast<std::uint16_t>(column % column_span));
    if (density > masked_density) A.masks = masks_of(A, columns);
    return A;
}

template Sparse<float> prepare(const CsrView<float, std::int32_t>&, Index, Index);
template Sparse<float> prepare(const CsrView<float, std::int64_t>&, Index, Index);
template Sparse<double> prepare(const CsrView<double, std::int32_t>&, Index, Index);
template Sparse<double> prepare(const CsrView<double, std::int64_t>&, Index, Index);

}  // namespace pysolve
