#include "pysolve/problem.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pysolve/prox.hpp"

namespace pysolve {
namespace {

MatrixView<const double> correlations(const Problem& problem, const Reader& reader) {
    return {reader.xx, problem.inputs, problem.inputs, problem.inputs};
}

// Lanczos with full reorthogonalisation: a lower bound on λ_max, correct to a few digits after `steps`.
double lanczos_estimate(MatrixView<const double> R, Index steps) {
    const Index n = R.rows;
    std::vector<Vector> basis;
    Vector v(static_cast<std::size_t>(n)), w(v.size()), diagonal, off_diagonal;
    std::uint64_t state = 0x9e3779b97f4a7c15ULL;
    for (double& value : v) {  // any start that is not orthogonal to the top eigenvector will do
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        value = 0.5 + static_cast<double>(state >> 11) * 0x1p-53;
        if (state >> 63) value = -value;
    }
    double length = norm(v);
    while (std::ssize(diagonal) < steps) {
        for (double& value : v) value /= length;
        multiply_symmetric(R, v.data(), w.data());
        diagonal.push_back(dot(v, w));
        basis.push_back(v);
        for (const Vector& u : basis) {
            const double along = dot(u, w);
            for (std::size_t i = 0; i < w.size(); ++i) w[i] -= along * u[i];
        }
        length = norm(w);
        if (length <= 1e-12 * std::abs(diagonal.front()) || std::ssize(diagonal) == steps) break;
        off_diagonal.push_back(length);
        v.swap(w);
    }
    off_diagonal.resize(diagonal.size());
    return largest_tridiagonal_eigenvalue(diagonal, off_diagonal);
}

bool bounds_spectrum(MatrixView<const double> R, double bound, Vector& work) {
    work.assign(R.data, R.data + R.rows * R.stride);
    for (double& value : work) value = -value;
    for (Index i = 0; i < R.rows; ++i) work[static_cast<std::size_t>(i * (R.stride + 1))] += bound;
    return cholesky({work.data(), R.rows, R.cols, R.stride});
}

}  // namespace

bool Certificate::within(double tol) const {
    return gap <= std::max(tol * reference, floor);
}

Vector kkt_residuals(const Problem& problem, double lam, const Vector& M, const Vector& T) {
    Vector residuals(static_cast<std::size_t>(problem.groups()));
    Vector G(static_cast<std::size_t>(problem.block()));
    for (Index g = 0; g < problem.groups(); ++g) {
        const auto m = problem.group(M.data(), g), t = problem.group(T.data(), g),
                   c = problem.group(problem.yx, g);
        const double threshold = lam * problem.weights[g], length = norm(m);
        const double pull = length > 0.0 ? threshold / length : 0.0;
        for (std::size_t i = 0; i < m.size(); ++i) G[i] = t[i] - c[i] + pull * m[i];
        const double residual = norm(G);
        residuals[static_cast<std::size_t>(g)] =
            length > 0.0 ? residual : std::max(residual - threshold, 0.0);
    }
    return residuals;
}

double lipschitz_bound(const Problem& problem) {
    double bound = 0.0;
    Vector work;
    for (const Reader& reader : problem.readers) {
        const auto R = correlations(problem, reader);
        double candidate = 1.01 * lanczos_estimate(R, std::min<Index>(problem.inputs, 24));
        if (candidate <= bound) candidate = bound;
        if (candidate <= 0.0) continue;
        while (!bounds_spectrum(R, candidate, work)) candidate *= 1.05;
        bound = candidate;
    }
    return bound;
}

bool Recorder::operator()(const Certificate& certificate) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    const Index iteration = std::ssize(history_);
    history_.push_back({iteration, elapsed.count(), certificate.objective, certificate.gap});
    if (monitor_) monitor_(history_.back());
    return certificate.within(stopping_.tol) || iteration >= stopping_.max_iter;
}

Result Recorder::result(const Problem& problem, double lam, Vector M, const Vector& T,
                        const Certificate& certificate) {
    Result result;
    result.kkt = kkt_residuals(problem, lam, M, T);
    result.M = std::move(M);
    result.certificate = certificate;
    result.iterations = iterations();
    result.history = std::move(history_);
    return result;
}

}  // namespace pysolve
