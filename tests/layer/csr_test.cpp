// Every kernel on arrays of exact size, for the sanitizers; results against the plain triple loop.
#include "pysolve/csr.hpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <vector>

#include "pysolve/threads.hpp"

using namespace pysolve;

namespace {

int failures = 0;

template <class T>
struct Case {
    Index rows, columns, batch;
    double density;
    std::mt19937 random;
    std::vector<std::int32_t> starts{0}, indices;
    std::vector<T> values, X;

    Case(Index rows_, Index columns_, Index batch_, double density_)
        : rows(rows_), columns(columns_), batch(batch_), density(density_) {
        std::uniform_real_distribution<double> uniform(-1, 1);
        for (Index r = 0; r < rows; ++r) {
            for (Index c = 0; c < columns; ++c)
                if (std::abs(uniform(random)) < density) {
                    indices.push_back(static_cast<std::int32_t>(c));
                    values.push_back(static_cast<T>(uniform(random)));
                }
            starts.push_back(static_cast<std::int32_t>(values.size()));
        }
        for (Index i = 0; i < columns * batch; ++i) X.push_back(static_cast<T>(uniform(random)));
    }

    CsrView<T, std::int32_t> view() const {
        return {rows, columns, starts.data(), indices.data(), values.data()};
    }
};

void expect(bool good, const char* what, Index rows, Index columns, Index batch, double density) {
    if (good) return;
    ++failures;
    std::printf("%s is wrong for %td x %td, batch %td, density %g, level %d\n", what, rows, columns, batch,
                density, static_cast<int>(level()));
}

template <class T>
void check(const Case<T>& one, Index block, int threads) {
    const Sparse<T> A = prepare(one.view(), static_cast<Index>(one.values.size()), block);
    const double tolerance = (sizeof(T) == 4 ? 1e-4 : 1e-12) * static_cast<double>(one.columns + 1);
    const auto at = [&](Layout layout, Index feature, Index sample, Index features) {
        return static_cast<std::size_t>(layout == Layout::feature ? feature * one.batch + sample
                                                                  : sample * features + feature);
    };
    for (Layout layout : {Layout::feature, Layout::batch}) {
        const bool feature = layout == Layout::feature;
        std::vector<T> Y(static_cast<std::size_t>(one.rows * one.batch)),
            bias(static_cast<std::size_t>(one.rows), T(2));
        const Dense<const T> X{one.X.data(), feature ? one.batch : one.columns, layout};
        multiply(A, X, one.batch, Dense<T>{Y.data(), feature ? one.batch : one.rows, layout}, bias.data(),
                 false, threads);
        std::vector<T> gradient(static_cast<std::size_t>(A.entries));
        value_gradient(A, Dense<const T>{Y.data(), feature ? one.batch : one.rows, layout}, X, one.batch,
                       gradient.data(), threads);
        bool right = true, steep = true;
        for (Index r = 0; r < one.rows; ++r) {
            const auto row = static_cast<std::size_t>(r);
            for (Index j = 0; j < one.batch; ++j) {
                double sum = 2;
                for (auto i = static_cast<std::size_t>(one.starts[row]);
                     i < static_cast<std::size_t>(one.starts[row + 1]); ++i)
                    sum += static_cast<double>(one.values[i]) *
                           static_cast<double>(one.X[at(layout, one.indices[i], j, one.columns)]);
                right =
                    right && std::abs(sum - static_cast<double>(Y[at(layout, r, j, one.rows)])) < tolerance;
            }
            for (auto i = static_cast<std::size_t>(one.starts[row]);
                 i < static_cast<std::size_t>(one.starts[row + 1]); ++i) {
                double sum = 0;
                for (Index j = 0; j < one.batch; ++j)
                    sum += static_cast<double>(Y[at(layout, r, j, one.rows)]) *
                           static_cast<double>(one.X[at(layout, one.indices[i], j, one.columns)]);
                steep = steep && std::abs(sum - static_cast<double>(gradient[i])) < 1e3 * tolerance;
            }
        }
        expect(right, "the product", one.rows, one.columns, one.batch, one.density);
        expect(steep, "the gradient", one.rows, one.columns, one.batch, one.density);
    }
}

template <class T>
void check_all() {
    for (const auto [rows, columns] :
         {std::pair<Index, Index>{0, 5}, {5, 0}, {1, 1}, {17, 33}, {40, 257}, {9, 700}})
        for (Index batch : {1, 8, 17, 100})
            for (double density : {0.0, 0.05, 0.6}) {
                const Case<T> one(rows, columns, batch, density);
                check(one, 0, 1);
                if (density == 0.6) check(one, 32, 3);
            }
    // Enough work to wake the threads, in whole tiles and in parts of one.
    for (Index batch : {64, 150}) check(Case<T>(100, 900, batch, 0.2), 0, 3);
}

void check_refusals() {
    const std::vector<float> values{1, 2, 3};
    const std::vector<std::int32_t> good{0, 2, 3}, decreasing{0, 3, 2}, long_one{0, 2, 4}, columns{0, 1, 1},
        far{0, 1, 2};
    const auto refuses = [&](const std::vector<std::int32_t>& starts,
                             const std::vector<std::int32_t>& indices) {
        try {
            prepare(CsrView<float, std::int32_t>{2, 2, starts.data(), indices.data(), values.data()}, 3);
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    if (refuses(good, columns) || !refuses(decreasing, columns) || !refuses(long_one, columns) ||
        !refuses(good, far)) {
        ++failures;
        std::printf("malformed matrices are not told from good ones\n");
    }
}

}  // namespace

int main() {
    check_refusals();
    for (Level one : {Level::plain, Level::avx2, Level::avx512}) {
        if (!supported(one)) continue;
        set_level(one);
        check_all<float>();
        check_all<double>();
    }
    return failures ? 1 : 0;
}
