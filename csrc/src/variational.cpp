#include "pysolve/variational.hpp"

#include <cmath>
#include <stdexcept>

#include "pysolve/lanes.hpp"

namespace pysolve {
namespace {

// out_i = factor · in_i · roots_i
PYSOLVE_CLONES void scale_row(double factor, const double* in, const double* roots, double* out,
                              std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] = factor * in[i] * roots[i];
}

PYSOLVE_CLONES void scale_row(double factor, const double* in, double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] = factor * in[i];
}

}  // namespace

void VariationalSolve::operator()(double lam, const Vector& scales, Vector& M) {
    const Problem& p = problem_;
    const auto n = static_cast<std::size_t>(p.inputs), columns = static_cast<std::size_t>(p.outputs);
    root_.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto g = i / static_cast<std::size_t>(p.group_size);
        root_[i] = std::sqrt(scales[g] / (lam * p.weights[g]));
        scale_row(root_[i], p.yx + i * columns, &M[i * columns], columns);
    }
    S_.resize(n * n);
    const MatrixView<double> S{S_.data(), p.inputs, p.inputs, p.inputs};
    Index offset = 0;
    for (const Reader& reader : p.readers) {
        // LAPACK's lower triangle is the upper one of a row-major matrix.
        for (std::size_t i = 0; i < n; ++i) {
            scale_row(root_[i], reader.xx + i * n + i, &root_[i], &S_[i * n + i], n - i);
            S_[i * n + i] += 1.0;
        }
        if (!cholesky(S)) throw std::invalid_argument("r_xx is not positive semi-definite.");
        cholesky_solve(S, {M.data() + offset, p.inputs, reader.outputs, p.outputs});
        offset += reader.outputs;
    }
    for (std::size_t i = 0; i < n; ++i) scale_row(root_[i], &M[i * columns], &M[i * columns], columns);
}

}  // namespace pysolve
