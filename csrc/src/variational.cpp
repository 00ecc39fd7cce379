#include "pysolve/variational.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pysolve/lanes.hpp"
#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

// out_i = factor · in_i
PYSOLVE_CLONES void scale_row(double factor, const double* in, double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] = factor * in[i];
}

// out_i = factor · in_i · roots_i
PYSOLVE_CLONES void scale_row(double factor, const double* in, const double* roots, double* out,
                              std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] = factor * in[i] * roots[i];
}

// out_i = a_i + factor · b_i
PYSOLVE_CLONES void add_multiple(const double* a, double factor, const double* b, double* out,
                                 std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] = a[i] + factor * b[i];
}

// out_i ← −in_i · out_i: the entries of (I − S⁻¹) ∘ Y Yᵀ off the diagonal
PYSOLVE_CLONES void negate_products(const double* in, double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] *= -in[i];
}

PYSOLVE_CLONES void add(const double* in, double* out, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) out[i] += in[i];
}

// Stretches [first, last) of positions whose groups follow one another: their inputs are contiguous.
std::vector<std::pair<std::size_t, std::size_t>> consecutive(const std::vector<Index>& groups) {
    std::vector<std::pair<std::size_t, std::size_t>> runs;
    for (std::size_t a = 0; a < groups.size(); ++a) {
        if (a > 0 && groups[a] == groups[a - 1] + 1) {
            runs.back().second = a + 1;
        } else {
            runs.emplace_back(a, a + 1);
        }
    }
    return runs;
}

}  // namespace

bool Variational::evaluate(const std::vector<Index>& groups, const Vector& scales) {
    const Problem& p = problem_;
    groups_ = groups;
    phi_ = 0.0;
    ratios_.resize(groups.size());
    if (groups.empty()) return true;
    const auto k = static_cast<std::size_t>(p.group_size), h = static_cast<std::size_t>(p.outputs);
    const auto n = static_cast<std::size_t>(inputs()), d = static_cast<std::size_t>(p.inputs);
    root_.resize(n);
    Y_.resize(n * h);
    for (std::size_t a = 0; a < groups.size(); ++a) {
        const auto first = static_cast<std::size_t>(groups[a]) * k;
        const double root = std::sqrt(scales[a] / (lam_ * p.weights[groups[a]]));
        std::fill_n(root_.begin() + static_cast<Index>(a * k), k, root);
        scale_row(root, p.yx + first * h, &Y_[a * k * h], k * h);
    }
    const auto runs = consecutive(groups);
    // LAPACK's lower triangle is the upper one of a row-major matrix.
    S_.resize(p.readers.size());
    for (std::size_t r = 0; r < p.readers.size(); ++r) {
        S_[r].resize(n * n);
        for (std::size_t i = 0; i < n; ++i) {
            const double* row = p.readers[r].xx + (static_cast<std::size_t>(groups[i / k]) * k + i % k) * d;
            for (const auto& [first, last] : runs) {
                const std::size_t from = std::max(first, i / k);
                if (from < last)
                    scale_row(root_[i], row + static_cast<std::size_t>(groups[from]) * k, &root_[from * k],
                              &S_[r][i * n + from * k], (last - from) * k);
            }
            S_[r][i * (n + 1)] += 1.0;
        }
        const MatrixView<double> S{S_[r].data(), inputs(), inputs(), inputs()};
        if (!cholesky(S)) return false;
        cholesky_solve(S, p.part(Y_.data(), inputs(), r));
    }
    for (std::size_t a = 0; a < groups.size(); ++a) {
        const std::span<const double> y{&Y_[a * k * h], k * h};
        const double threshold = lam_ * p.weights[groups[a]], root = root_[a * k];
        phi_ += 0.5 * (threshold * scales[a] - root * dot(p.group(p.yx, groups[a]), y));
        ratios_[a] = norm(y) / root / threshold;
    }
    return true;
}

bool Variational::evaluate_all(const Vector& scales) {
    std::vector<Index> groups;
    Vector positive;
    for (std::size_t g = 0; g < scales.size(); ++g)
        if (scales[g] > 0.0) {
            groups.push_back(static_cast<Index>(g));
            positive.push_back(scales[g]);
        }
    return evaluate(groups, positive);
}

void Variational::hessian(Vector& out) {
    const auto count = groups_.size(), k = static_cast<std::size_t>(problem_.group_size);
    const auto n = static_cast<std::size_t>(inputs());
    // Groups of one input need no sums: what the first reader adds is the Hessian itself.
    const bool direct = k == 1;
    if (direct) {
        out.resize(n * n);
    } else {
        out.assign(count * count, 0.0);
    }
    for (std::size_t r = 0; r < S_.size(); ++r) {
        const MatrixView<double> S{S_[r].data(), inputs(), inputs(), inputs()};
        Vector& gram = direct && r == 0 ? out : gram_;
        gram.resize(n * n);
        invert_from_cholesky(S);
        multiply_self(problem_.part(std::as_const(Y_).data(), inputs(), r),
                      {gram.data(), S.rows, S.cols, S.stride});
        for (std::size_t i = 0; i < n; ++i) {
            double* own = &gram[i * n];
            own[i] *= 1.0 - S_[r][i * (n + 1)];
            negate_products(&S_[r][i * n + i + 1], own + i + 1, n - i - 1);
            if (direct) {
                if (r > 0) add(own + i, &out[i * n + i], n - i);
                continue;
            }
            double* row = &out[i / k * count];
            row[i / k] += own[i];
            for (std::size_t j = i + 1; j < (i / k + 1) * k; ++j) row[i / k] += 2.0 * own[j];
            for (std::size_t b = i / k + 1; b < count; ++b)
                for (std::size_t j = b * k; j < (b + 1) * k; ++j) row[b] += own[j];
        }
    }
}

void Variational::scatter(Vector& M) const {
    const auto block = static_cast<std::size_t>(problem_.block());
    std::ranges::fill(M, 0.0);
    for (std::size_t a = 0; a < groups_.size(); ++a)
        scale_row(root_[a * static_cast<std::size_t>(problem_.group_size)], &Y_[a * block],
                  problem_.group(M.data(), groups_[a]).data(), block);
}

void Variational::scatter_product(Vector& T) const {
    const auto block = static_cast<std::size_t>(problem_.block());
    for (std::size_t a = 0; a < groups_.size(); ++a) {
        const double root = root_[a * static_cast<std::size_t>(problem_.group_size)];
        add_multiple(problem_.yx + groups_[a] * problem_.block(), -1.0 / root, &Y_[a * block],
                     problem_.group(T.data(), groups_[a]).data(), block);
    }
}

}  // namespace pysolve
