#include "pysolve/obs.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "pysolve/threads.hpp"

namespace pysolve {
namespace {

std::size_t size(Index n) {
    return static_cast<std::size_t>(n);
}

// Removals that are collected before they are applied to all of S, and rows of S that are updated at a time.
constexpr Index panel = 32, tile = 64;

// One row's elimination; S holds its lower triangle.
class Row {
  public:
    explicit Row(Index inputs)
        : inputs_(inputs), S_(size(inputs * inputs)), F_(size(panel * inputs)), G_(size(panel * inputs)) {}

    void run(MatrixView<const double> inverse, const double* w, std::int32_t* order, double* change) {
        start(inverse, w);
        for (Index step = 0; step < inputs_; ++step) {
            const Index p = cheapest();
            order[step] = column_[size(p)];
            change[step] = 0.5 * w_[size(p)] * w_[size(p)] / diagonal_[size(p)];
            remove(p);
            if (used_ == panel) apply();
        }
    }

  private:
    void start(MatrixView<const double> inverse, const double* w) {
        left_ = inputs_;
        used_ = 0;
        for (Index i = 0; i < inputs_; ++i)
            std::copy_n(inverse.data + i * inverse.stride, i + 1, S_.data() + i * inputs_);
        w_.assign(w, w + inputs_);
        column_.resize(size(inputs_));
        std::iota(column_.begin(), column_.end(), 0);
        diagonal_.resize(size(inputs_));
        for (Index i = 0; i < inputs_; ++i) diagonal_[size(i)] = S_[size(i * (inputs_ + 1))];
        least_.resize(size(inputs_));
        // Rounding must not turn what is left of a variance negative.
        for (Index i = 0; i < inputs_; ++i) least_[size(i)] = 1e-14 * diagonal_[size(i)];
        alive_.assign(size(inputs_), true);
    }

    Index cheapest() const {
        std::size_t winner = 0;
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t i = 0; i < size(left_); ++i) {
            if (!alive_[i]) continue;
            const double cost = w_[i] * w_[i] / diagonal_[i];
            if (cost < least || least == std::numeric_limits<double>::infinity()) {
                least = cost;
                winner = i;
            }
        }
        return static_cast<Index>(winner);
    }

    void remove(Index p) {
        double* f = F_.data() + used_ * inputs_;
        const double* row = S_.data() + p * inputs_;
        std::copy_n(row, p, f);
        for (Index i = p; i < left_; ++i) f[i] = S_[size(i * inputs_ + p)];
        for (Index t = 0; t < used_; ++t) {
            const double* g = F_.data() + t * inputs_;
            const double factor = g[p];
            for (Index i = 0; i < left_; ++i) f[i] -= factor * g[i];
        }
        const double root = std::sqrt(diagonal_[size(p)]), step = w_[size(p)] / root;
        for (Index i = 0; i < left_; ++i) {
            f[i] /= root;
            w_[size(i)] -= step * f[i];
            diagonal_[size(i)] = std::max(diagonal_[size(i)] - f[i] * f[i], least_[size(i)]);
        }
        alive_[size(p)] = false;
        ++used_;
    }

    // S −= F Fᵀ on the columns that are left, which move together.
    void apply() {
        std::vector<Index> stay;
        for (Index i = 0; i < left_; ++i)
            if (alive_[size(i)]) stay.push_back(i);
        const Index n = std::ssize(stay);
        for (Index i = 0; i < n; ++i) {
            const Index from = stay[size(i)];
            for (Index j = 0; j <= i; ++j)
                S_[size(i * inputs_ + j)] = S_[size(from * inputs_ + stay[size(j)])];
            for (Index t = 0; t < panel; ++t) G_[size(i * panel + t)] = F_[size(t * inputs_ + from)];
            w_[size(i)] = w_[size(from)];
            diagonal_[size(i)] = diagonal_[size(from)];
            least_[size(i)] = least_[size(from)];
            column_[size(i)] = column_[size(from)];
        }
        left_ = n;
        used_ = 0;
        alive_.assign(size(n), true);
        // In pieces so small that BLAS works on them in this thread: the rows have threads of their own.
        for (Index i = 0; i < n; i += tile) {
            const Index rows = std::min(tile, n - i);
            for (Index j = 0; j < i + rows; j += tile) {
                const Index columns = std::min(tile, i + rows - j);
                add_product(-1.0, {G_.data() + i * panel, rows, panel, panel},
                            {G_.data() + j * panel, columns, panel, panel},
                            {S_.data() + i * inputs_ + j, rows, columns, inputs_});
            }
        }
    }

    Index inputs_, left_ = 0, used_ = 0;
    Vector S_, F_, G_, w_, diagonal_, least_;  // G: F transposed
    std::vector<std::int32_t> column_;
    std::vector<char> alive_;
};

}  // namespace

RowPaths eliminate_rows(MatrixView<const double> inverse, MatrixView<const double> W,
                        const Monitor& monitor) {
    const Index h = W.rows, d = W.cols;
    RowPaths paths{std::vector<std::int32_t>(size(h * d)), Vector(size(h * d))};
    // Rounds of a few rows a thread, so that the monitor is asked in between.
    const Index threads = std::min<Index>(num_threads(), h), round = 4 * threads;
    std::vector<Row> workers(size(threads), Row(d));
    for (Index first = 0; first < h; first += round) {
        const Index last = std::min(first + round, h);
        parallel(static_cast<int>(threads), threads, [&](std::int64_t t) {
            for (Index i = first + t; i < last; i += threads)
                workers[size(t)].run(inverse, W.data + i * W.stride, paths.order.data() + i * d,
                                     paths.change.data() + i * d);
        });
        if (monitor) monitor({last, 0.0, 0.0, 0.0});
    }
    return paths;
}

}  // namespace pysolve
